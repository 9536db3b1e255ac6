"""What ends soon and has to be renewed by somebody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509

from miniistiod.revocation import signs_lists

if TYPE_CHECKING:
    from miniistiod.store import Store

__all__ = ["TOKEN_WARNING", "next_token_end", "warnings"]

_DAY = 86_400.0
TOKEN_WARNING = 14 * _DAY
"""Seconds before its end from which on a reusable token is warned of."""
SHARE = 0.2
"""Share of its life that is left of a CA certificate when it is warned of. Source: istiod's rotation point."""


def warnings(store: Store, now: float) -> list[str]:
    """A sentence for each token and CA certificate that ends soon."""
    found = []
    for item in store.list_tokens():
        left = item.expires - now
        if item.kind == "reusable" and item.state(now) == "valid" and left < TOKEN_WARNING:
            account = f"{item.namespace}/{item.service_account}"
            found.append(
                f"the reusable token {item.id} of {account} expires in {_days(left)}; renew it with"
                f" 'miniistiod token renew {item.id}'"
            )
    plugged = store.plugged()
    certificates = list(store.roots())
    remedy = "replace it with 'miniistiod root rotate'"
    if plugged is not None:
        certificates += x509.load_pem_x509_certificates((plugged.certificate + plugged.issuers).encode())
        remedy = "renew it in the directory of the CA (--ca-dir)"
        if not signs_lists(x509.load_pem_x509_certificate(plugged.certificate.encode())):
            found.append(
                "the CA certificate that signs may not sign revocation lists (its key usage lacks cRLSign), so nobody"
                " hears of a revoked certificate before it ends; give it cRLSign"
            )
    elif store.rotation() is not None:
        certificates = certificates[1:]  # the older one is on its way out
    for certificate in dict.fromkeys(certificates):
        begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
        if end - now < SHARE * (end - begin):
            name = certificate.subject.rfc4514_string() or "(no name)"
            found.append(f"the CA certificate {name} expires in {_days(end - now)}; {remedy}")
    return found


def next_token_end(store: Store, now: float) -> float:
    """When the next reusable token that is good ends, in seconds since 1970; 0 when there is none."""
    ends = [item.expires for item in store.list_tokens() if item.kind == "reusable" and item.state(now) == "valid"]
    return min(ends, default=0.0)


def _days(seconds: float) -> str:
    if seconds < _DAY:
        return f"{max(0.0, seconds) / 3600:.1f} hours"
    days = round(seconds / _DAY)
    return "1 day" if days == 1 else f"{days} days"
