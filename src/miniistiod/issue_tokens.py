"""Makes tokens, for the command and for programs that embed a control plane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from hbone.errors import ConfigurationError
from miniistiod import tokens
from miniistiod.resources.metadata import is_namespace, is_object_name
from ztunnel.wire.token import EnrolmentToken

if TYPE_CHECKING:
    from miniistiod.store import Store

__all__ = ["ONE_TIME_LIFETIME", "REUSABLE_LIFETIME", "NewToken", "create"]

ONE_TIME_LIFETIME = 3600.0
"""Seconds that a one-time token may be used in, unless asked otherwise."""
REUSABLE_LIFETIME = 90 * 86_400.0
MAX_ONE_TIME = 7 * 86_400.0
MAX_REUSABLE = 366 * 86_400.0


@attrs.frozen(kw_only=True)
class NewToken:
    """A token that was made; its text is shown this once."""

    id: str
    text: str = attrs.field(repr=False)
    identity: str
    expires: float
    """Seconds since 1970."""


def create(
    store: Store,
    *,
    namespace: str,
    service_account: str,
    name: str | None,
    lifetime: float | None,
    reusable: bool,
    now: float,
) -> NewToken:
    """Make a token and list it in the state.

    Raises:
        ConfigurationError: a name that is none, or a lifetime beyond the limit.
    """
    if not is_namespace(namespace):
        raise ConfigurationError(f"namespace {namespace!r} is malformed; use lower case letters, digits and '-'")
    for what, value in (("service account", service_account), ("name", name)):
        if value is not None and not is_object_name(value):
            raise ConfigurationError(f"{what} {value!r} is malformed; use lower case letters, digits, '-' and '.'")
    if reusable and name is not None:
        raise ConfigurationError("a reusable token is not bound to a name; leave out --name, or leave out --reusable")
    limit = MAX_REUSABLE if reusable else MAX_ONE_TIME
    if lifetime is None:
        lifetime = REUSABLE_LIFETIME if reusable else ONE_TIME_LIFETIME
    if not 1 <= lifetime <= limit:
        raise ConfigurationError(f"a lifetime of {lifetime:g} s is out of range; give 1s to {limit / 86_400:g}d")
    token_id, expires = tokens.new_id(), now + lifetime
    identity = f"spiffe://{store.trust_domain}/ns/{namespace}/sa/{service_account}"
    if reusable:
        secret = text = tokens.sign_reusable(
            tokens.ReusableToken(
                id=token_id,
                trust_domain=store.trust_domain,
                namespace=namespace,
                service_account=service_account,
                issued=int(now),
                expires=int(expires),
            ),
            store.token_key,
        )
    else:
        secret = tokens.new_secret(token_id)
        text = str(
            EnrolmentToken(
                secret=secret,
                root_sha256=store.signer().sha256,
                trust_domain=store.trust_domain,
                namespace=namespace,
                service_account=service_account,
                name=name,
            )
        )
    store.add_token(
        token_id=token_id,
        kind="reusable" if reusable else "one-time",
        secret=secret,
        namespace=namespace,
        service_account=service_account,
        name=name,
        now=now,
        expires=expires,
    )
    return NewToken(id=token_id, text=text, identity=identity, expires=expires)
