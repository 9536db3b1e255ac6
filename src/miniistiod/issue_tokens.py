"""Makes tokens, for the command and for programs that embed a control plane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from hbone.errors import ConfigurationError
from miniistiod import ca, tokens
from miniistiod.resources.metadata import is_namespace, is_object_name
from ztunnel.wire.token import EnrolmentToken

if TYPE_CHECKING:
    from miniistiod.store import Store

__all__ = ["ONE_TIME_LIFETIME", "REUSABLE_LIFETIME", "NewToken", "create", "renew"]

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
    node: str = "",
    group: str = "",
    instead_of: str | None = None,
) -> NewToken:
    """Make a token and list it in the state.

    Args:
        store: the state.
        namespace: of the identity.
        service_account: of the identity.
        name: the workload that the host will be.
        lifetime: seconds that it may be used in; None for the customary one.
        reusable: it is presented again and again.
        now: seconds since 1970.
        node: it is for the proxy of this node, which may ask for the identities of the workloads there.
        group: its host registers itself in this WorkloadGroup.
        instead_of: id of a token that is revoked by this.

    Raises:
        ConfigurationError: a name that is none, or a lifetime beyond the limit.
    """
    if not is_namespace(namespace):
        raise ConfigurationError(f"namespace {namespace!r} is malformed; use lower case letters, digits and '-'")
    names = (("service account", service_account), ("name", name), ("node", node or None), ("group", group or None))
    for what, value in names:
        if value is not None and not is_object_name(value):
            raise ConfigurationError(f"{what} {value!r} is malformed; use lower case letters, digits, '-' and '.'")
    if reusable and name is not None:
        raise ConfigurationError("a reusable token is not bound to a name; leave out --name, or leave out --reusable")
    if node and group:
        raise ConfigurationError("a node's proxy is no workload of a group; leave out --node, or leave out --group")
    if not group and name is not None:
        before = store.registrations().get((namespace, name))
        if before is not None and before.service_account == service_account:
            group = before.group  # a machine that comes back
    limit = MAX_REUSABLE if reusable else MAX_ONE_TIME
    if lifetime is None:
        lifetime = REUSABLE_LIFETIME if reusable else ONE_TIME_LIFETIME
    if not 1 <= lifetime <= limit:
        raise ConfigurationError(f"a lifetime of {lifetime:g} s is out of range; give 1s to {limit / 86_400:g}d")
    token_id, expires = tokens.new_id(), now + lifetime
    root_sha256 = ""
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
        root_sha256 = ca.fingerprint(store.server_root())
        text = str(
            EnrolmentToken(
                secret=secret,
                root_sha256=bytes.fromhex(root_sha256),
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
        root_sha256=root_sha256,
        node=node,
        group=group,
        instead_of=instead_of,
    )
    return NewToken(id=token_id, text=text, identity=identity, expires=expires)


def renew(store: Store, token_id: str, *, lifetime: float | None, now: float) -> NewToken:
    """Make another token for what one was made for.

    A reusable one stays good until its end, so that hosts can change over; an unused one-time token is revoked.

    Raises:
        ConfigurationError: there is none of that id, it was revoked, or the lifetime is beyond the limit.
    """
    old = store.token(token_id)
    if old is None:
        raise ConfigurationError(f"there is no token {token_id!r}; 'miniistiod token list' shows them")
    if old.revoked is not None:
        raise ConfigurationError(f"the token {token_id} is revoked; make a new one with 'miniistiod token create'")
    reusable = old.kind == "reusable"
    return create(
        store,
        namespace=old.namespace,
        service_account=old.service_account,
        name=old.name,
        lifetime=lifetime if lifetime is not None else old.expires - old.created,
        reusable=reusable,
        now=now,
        node=old.node,
        group=old.group,
        instead_of=None if reusable else token_id,
    )
