"""The state of a control plane: one SQLite file in a private directory. No other package knows SQL."""

from miniistiod.store.authority import Crl, Plugged, serial_text
from miniistiod.store.base import ADMIN_SOCKET, CRL_FILE, ROOT_FILE, locked
from miniistiod.store.database import Store
from miniistiod.store.records import (
    IssuedCertificate,
    Redemption,
    Registration,
    Revoked,
    StaleAuthorityError,
    TokenRecord,
)
from miniistiod.store.schema import DATABASE

__all__ = [
    "ADMIN_SOCKET",
    "CRL_FILE",
    "DATABASE",
    "ROOT_FILE",
    "Crl",
    "IssuedCertificate",
    "Plugged",
    "Redemption",
    "Registration",
    "Revoked",
    "StaleAuthorityError",
    "Store",
    "TokenRecord",
    "locked",
    "serial_text",
]
