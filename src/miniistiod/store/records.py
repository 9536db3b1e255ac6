"""What the state says, as values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "IssuedCertificate",
    "Redemption",
    "Registration",
    "Revoked",
    "RootRecord",
    "StaleAuthorityError",
    "TokenRecord",
    "fields_of",
]


class StaleAuthorityError(Exception):
    """The roots or the list of what is revoked changed since a certificate was signed: it must not be handed out."""


@attrs.frozen(kw_only=True)
class TokenRecord:
    """A token as it is listed; its secret is not kept."""

    id: str
    kind: str
    """`one-time` or `reusable`."""
    namespace: str
    service_account: str
    name: str | None
    created: float
    expires: float
    spent: float | None
    revoked: float | None
    node: str = ""
    """The node whose proxy presents it; empty for a workload's own."""
    group: str = ""
    """The WorkloadGroup that its host registers in; empty for none."""
    root_sha256: str = ""
    """Of a one-time token: the root that it names, in hex."""

    def state(self, now: float) -> str:
        """What it is good for now, in a word."""
        if self.revoked is not None:
            return "revoked"
        if self.spent is not None:
            return "used"
        return "expired" if now >= self.expires else "valid"


@attrs.frozen(kw_only=True)
class Redemption:
    """What came of presenting a one-time token."""

    token: TokenRecord | None
    """None: refused, for `reason`."""
    reason: str = ""


@attrs.frozen(kw_only=True)
class IssuedCertificate:
    """A line of the register of certificates. Times are seconds since 1970."""

    serial: str
    """In hex, 32 digits."""
    spiffe_id: str
    name: str
    """The workload that its host was enrolled as; empty when the token named none."""
    key_sha256: str
    issued: float
    expires: float
    caller: str
    token: str = ""
    """The id of the token that it was issued for, or that the certificate it renews was."""
    parent: str = ""
    """The serial of the certificate that was presented for it."""
    signer: str = ""
    """SHA-256 of the certificate that signed it, in hex."""
    node: str = ""
    group: str = ""
    revoked: float | None = None

    def state(self, now: float) -> str:
        """What it is good for now, in a word."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if now >= self.expires else "valid"


@attrs.frozen(kw_only=True)
class RootRecord:
    """A root of the mesh."""

    id: int
    certificate: bytes
    """PEM."""
    key: bytes | None = attrs.field(repr=False)
    """PEM; None when it is elsewhere."""
    signing: bool
    created: float


@attrs.frozen(kw_only=True)
class Revoked:
    """What a revocation took away."""

    certificates: tuple[str, ...] = ()
    """Serials."""
    tokens: tuple[str, ...] = ()
    """Ids."""
    marks: tuple[tuple[str, str], ...] = ()
    """Namespace and name of WorkloadEntries that are reached in plaintext from now on."""
    registrations: tuple[tuple[str, str], ...] = ()
    """Namespace and name of machines that are no longer part of the mesh."""

    def __bool__(self) -> bool:
        return bool(self.certificates or self.tokens or self.marks or self.registrations)


@attrs.frozen(kw_only=True)
class Registration:
    """A machine that registered itself in a WorkloadGroup. Times are seconds since 1970."""

    namespace: str
    name: str
    group: str
    service_account: str
    address: str
    network: str = ""
    locality: str = ""
    labels: dict[str, str] = attrs.Factory(dict)
    node: str = ""
    serial: str = ""
    """The certificate that its stream was opened with."""
    stream: str = ""
    """The stream that keeps it; the newest wins."""
    connected: float
    disconnected: float | None = None
    """When its stream ended; None while one is open."""
    gone: bool = False
    """It was away for longer than the grace period, and is not part of the mesh until it comes back."""

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return (self.namespace, self.name)


def fields_of(columns: str, row: Sequence[Any]) -> dict[str, Any]:
    """A row by the fields of its record. `group` is a word of SQL, and so its column is called `grp`."""
    return {"group" if name == "grp" else name: value for name, value in zip(columns.split(", "), row, strict=True)}
