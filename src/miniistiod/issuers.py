"""Tokens of other issuers (OIDC): whose are believed, by which keys, and whom they stand for.

```yaml
issuers:
- issuer: https://idp.example.com         # must be the token's iss, letter by letter
  audiences: [istio-ca]                   # one of them must be in its aud
  jwksUri: https://idp.example.com/keys   # or jwksFile: keys.json, beside this file; or neither: see below
  caFile: idp-root.pem                    # optional: the roots of that server, else the system's
  namespace: {claim: team}                # or {value: ci}; nested claims as [kubernetes.io, namespace]
  serviceAccount: {claim: app}
  namespaces: [ci, build]                 # optional: it speaks for no others
```

With neither `jwksUri` nor `jwksFile` the issuer is asked for the place of its keys, at
`ISSUER/.well-known/openid-configuration`, which must name the same issuer.

Without `namespace` and `serviceAccount`, `sub` is `system:serviceaccount:NAMESPACE:ACCOUNT`, as a Kubernetes' tokens
have it.

Source: Istio's JWT authenticator; RFC 7515, 7517, 7519.
"""

from __future__ import annotations

import json
import math
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import yaml
from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError

from hbone.errors import ConfigurationError
from miniistiod.jwks import MAX_JWKS, Discovered, Jwks, KeysError, check_url
from miniistiod.resources.metadata import is_namespace, is_object_name
from miniistiod.tokens import BadToken

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Issuer", "Issuers", "read_issuers"]

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""Signatures that only a private key can make; what verifies them cannot forge them."""
MAX_TOKEN = 16 * 1024
"""Characters of a token."""
LEEWAY = 60.0
"""Seconds by which clocks may differ."""
_PREFIX = "system:serviceaccount:"


class _Registry(jws.JWSRegistry):
    """The algorithms that are believed. The older name EdDSA is still what most issuers write."""

    max_header_length = 4096
    max_payload_length = MAX_TOKEN

    def get_alg(self, name: str) -> Any:
        if name not in ALGORITHMS:
            raise UnsupportedAlgorithmError(f"Algorithm of '{name}' is not allowed")
        return self.algorithms[name]


_REGISTRY = _Registry(strict_check_header=False)


@attrs.frozen(kw_only=True)
class Mapped:
    """Where a name comes from: a claim, by the way to it, or a fixed value."""

    claim: tuple[str, ...] = ()
    value: str = ""

    def of(self, claims: Mapping[str, Any]) -> str:
        """The name; raises BadToken when the claim is missing or no text."""
        if self.value:
            return self.value
        found: Any = claims
        for name in self.claim:
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, str) or not found:
            raise BadToken(f"a token whose claim {'.'.join(self.claim)!r} is missing or no text")
        return found


@attrs.frozen(kw_only=True)
class Issuer:
    """One issuer and what its tokens stand for."""

    issuer: str
    audiences: frozenset[str]
    keys: Jwks
    namespace: Mapped | None = None
    service_account: Mapped | None = None
    namespaces: frozenset[str] = frozenset()
    """Those that it speaks for; none: all."""

    def account(self, claims: Mapping[str, Any]) -> tuple[str, str]:
        """Namespace and service account.

        Raises:
            BadToken: the token names none, or one that this issuer does not speak for.
        """
        if self.namespace is None or self.service_account is None:
            subject = claims.get("sub")
            parts = subject.split(":") if isinstance(subject, str) and subject.startswith(_PREFIX) else []
            if len(parts) != 4:
                raise BadToken(f"a token whose sub is not {_PREFIX}NAMESPACE:ACCOUNT")
            namespace, account = parts[2:]
        else:
            namespace, account = self.namespace.of(claims), self.service_account.of(claims)
        if not is_namespace(namespace) or not is_object_name(account):
            raise BadToken(f"a token for {namespace!r:.80} and {account!r:.80}, which name no namespace and account")
        if self.namespaces and namespace not in self.namespaces:
            raise BadToken(f"a token for the namespace {namespace!r}, for which its issuer does not speak")
        return namespace, account


class Issuers:
    """Verifies tokens of several issuers."""

    def __init__(self, issuers: Iterable[Issuer]) -> None:
        self._issuers = {item.issuer: item for item in issuers}

    def verify(self, text: str, now: float) -> tuple[str, str, str, float]:
        """Issuer, namespace, service account and time of issue of a token.

        Nothing that it says counts before the signature holds, but for the two names by which the key is found.

        Args:
            text: the token.
            now: seconds since 1970.

        Raises:
            BadToken: why not; never repeats the token.
        """
        if len(text) > MAX_TOKEN:
            raise BadToken(f"a token of {len(text)} characters, over {MAX_TOKEN}")
        try:
            signed = jws.extract_compact(text.encode("ascii"), registry=_REGISTRY)
            header, claims = signed.protected, json.loads(signed.payload or b"")
        except (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise BadToken("not a token") from None
        if not isinstance(header, dict) or not isinstance(claims, dict):
            raise BadToken("not a token")
        name = claims.get("iss")
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise BadToken(f"a token of the issuer {name!r:.200}, which is not configured")
        self._check_signature(issuer, text, header)
        _check_claims(issuer, claims, now)
        namespace, account = issuer.account(claims)
        return issuer.issuer, namespace, account, _seconds(claims, "iat") or 0.0

    def _check_signature(self, issuer: Issuer, text: str, header: Mapping[str, Any]) -> None:
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in ALGORITHMS:
            raise BadToken(f"a token signed by {algorithm!r:.40}; {', '.join(ALGORITHMS)} are believed")
        if "crit" in header or "b64" in header:
            raise BadToken("a token whose header demands what is not understood here")
        if key_id is not None and not isinstance(key_id, str):
            raise BadToken("a token whose kid is no text")
        try:
            keys = issuer.keys.keys(key_id)
        except KeysError as error:
            raise BadToken(f"a token of {issuer.issuer} that cannot be verified: {error}") from None
        for key in keys:
            if key.alg not in (None, algorithm):
                continue
            try:
                jws.deserialize_compact(text.encode("ascii"), key, algorithms=[algorithm], registry=_REGISTRY)
            except (JoseError, ValueError, TypeError, AttributeError):
                continue  # another key's
            return
        raise BadToken(f"a token that none of the keys of {issuer.issuer} has signed")


def _check_claims(issuer: Issuer, claims: Mapping[str, Any], now: float) -> None:
    audience = claims.get("aud")
    given = [audience] if isinstance(audience, str) else audience
    if not isinstance(given, list) or not any(isinstance(item, str) and item in issuer.audiences for item in given):
        raise BadToken(f"a token of {issuer.issuer} for another audience")
    expires, begins = _seconds(claims, "exp"), _seconds(claims, "nbf")
    if expires is None:
        raise BadToken(f"a token of {issuer.issuer} without an end (exp)")
    if now >= expires + LEEWAY:
        raise BadToken(f"a token of {issuer.issuer} that has expired")
    issued = _seconds(claims, "iat")
    if max(begins or 0.0, issued or 0.0) > now + LEEWAY:
        raise BadToken(f"a token of {issuer.issuer} from the future; compare the clocks")


def _seconds(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadToken(f"a token whose {name} is no time")
    if abs(value) > 1e12:
        raise BadToken(f"a token whose {name} is no time")
    return float(value)


# -- the file


def read_issuers(path: Path) -> Issuers:
    """Read the file of issuers.

    Raises:
        ConfigurationError: what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            data = yaml.safe_load(file.read(MAX_JWKS))
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {(error.strerror or '').lower()}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(f"{str(path)!r} cannot be parsed as YAML: {reason}") from None
    try:
        items = _fields(data, "the file", {"issuers"}).get("issuers")
        if not isinstance(items, list) or not items:
            raise _Wrong("it must have a list 'issuers'")
        found = [_issuer(item, f"issuers[{number}]", path.parent) for number, item in enumerate(items)]
        names = [item.issuer for item in found]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise _Wrong(f"the issuer {min(repeated)!r} is there twice")
    except _Wrong as error:
        raise ConfigurationError(f"{str(path)!r} cannot be used: {error}") from None
    return Issuers(found)


class _Wrong(Exception):
    pass


_FIELDS = {
    *("issuer", "audiences", "jwksUri", "jwksFile", "caFile"),
    *("namespace", "serviceAccount", "namespaces"),
}


def _issuer(data: Any, where: str, directory: Path) -> Issuer:
    fields = _fields(data, where, _FIELDS)
    issuer = _text(fields, "issuer", where)
    audiences = _texts(fields, "audiences", where)
    if not audiences:
        raise _Wrong(f"{where}.audiences is missing; name what the tokens are for, for example [istio-ca]")
    mapped = [_mapped(fields[name], f"{where}.{name}") if name in fields else None for name in _NAMES]
    if (mapped[0] is None) != (mapped[1] is None):
        raise _Wrong(f"{where} maps only one of namespace and serviceAccount; map both, or neither")
    ca_file = directory / _text(fields, "caFile", where) if "caFile" in fields else None
    source = _source(fields, issuer, where, directory)
    return Issuer(
        issuer=issuer,
        audiences=frozenset(audiences),
        keys=_keys(source, ca_file, where),
        namespace=mapped[0],
        service_account=mapped[1],
        namespaces=frozenset(_texts(fields, "namespaces", where)),
    )


_NAMES = ("namespace", "serviceAccount")


def _keys(source: Path | str | Discovered, ca_file: Path | None, where: str) -> Jwks:
    """A file that cannot be read is told at the start; a server may come up later."""
    keys = Jwks(source, ca_file)
    try:
        if isinstance(source, Path):
            keys.keys(None)
        if ca_file is not None:
            ssl.create_default_context(cafile=str(ca_file))
    except KeysError as error:
        raise _Wrong(f"{where}: {error}") from None
    except OSError as error:
        raise _Wrong(f"{where}.caFile cannot be used: {(error.strerror or str(error)).lower()}") from None
    return keys


def _source(fields: Mapping[str, Any], issuer: str, where: str, directory: Path) -> Path | str | Discovered:
    """Where an issuer's keys are."""
    if "jwksUri" in fields and "jwksFile" in fields:
        raise _Wrong(f"{where} must have either jwksUri or jwksFile, not both")
    if "jwksFile" in fields:
        return directory / _text(fields, "jwksFile", where)
    try:
        if "jwksUri" in fields:
            return check_url(_text(fields, "jwksUri", where))
        check_url(issuer)
    except KeysError as error:
        if "jwksUri" in fields:
            raise _Wrong(f"{where}.jwksUri: {error}") from None
        raise _Wrong(
            f"{where} must have either jwksUri or jwksFile, because its issuer cannot be asked for them: {error}"
        ) from None
    return Discovered(issuer)


def _mapped(data: Any, where: str) -> Mapped:
    fields = _fields(data, where, {"claim", "value"})
    if len(fields) != 1:
        raise _Wrong(f"{where} must have either claim or value")
    if "value" in fields:
        return Mapped(value=_text(fields, "value", where))
    claim = fields["claim"]
    names = [claim] if isinstance(claim, str) else claim
    if not isinstance(names, list) or not names or not all(isinstance(item, str) and item for item in names):
        raise _Wrong(f"{where}.claim must be a name, or a list of names that lead to a nested one")
    return Mapped(claim=tuple(names))


def _fields(data: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _Wrong(f"{where} must be a mapping")
    for name in data:
        if name not in known:
            raise _Wrong(
                f"{where} has the field {str(name)[:80]!r}, which is none; there are {', '.join(sorted(known))}"
            )
    return data


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise _Wrong(f"{where}.{name} must be a text")
    return value


def _texts(fields: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = fields.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _Wrong(f"{where}.{name} must be a list of texts")
    return value
