"""The part of the state that tokens live on. Of their texts only hashes are kept."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from miniistiod import tokens
from miniistiod.store.authority import AuthorityState
from miniistiod.store.records import Redemption, TokenRecord, fields_of

if TYPE_CHECKING:
    from miniistiod.tokens import ReusableToken

__all__ = ["RETRY_SECONDS", "TokenState"]

RETRY_SECONDS = 60.0
"""How long the same key may come again with a one-time token, after an answer was lost on its way."""
_FIELDS = "id, kind, namespace, service_account, name, created, expires, spent, revoked, node, grp, root_sha256"


class TokenState(AuthorityState):
    """Tokens: made, listed, used, revoked."""

    def add_token(
        self,
        *,
        token_id: str,
        kind: str,
        secret: str,
        namespace: str,
        service_account: str,
        name: str | None,
        now: float,
        expires: float,
        node: str = "",
        group: str = "",
        root_sha256: str = "",
        instead_of: str | None = None,
    ) -> None:
        """List a new token; with `instead_of`, revoke that one in the same step."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO tokens (id, kind, secret_sha256, namespace, service_account, name, created, expires, node,"
                " grp, root_sha256) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    token_id,
                    kind,
                    tokens.secret_hash(secret),
                    namespace,
                    service_account,
                    name,
                    now,
                    expires,
                    node,
                    group,
                    root_sha256,
                ),
            )
            if instead_of is not None:
                self.revoke_token(instead_of, now)

    def list_tokens(self) -> list[TokenRecord]:
        """Every token, oldest first."""
        return [_record(row) for row in self._rows(f"SELECT {_FIELDS} FROM tokens ORDER BY created, id")]

    def token(self, token_id: str) -> TokenRecord | None:
        """A token by its id."""
        rows = self._rows(f"SELECT {_FIELDS} FROM tokens WHERE id = ?", token_id)
        return _record(rows[0]) if rows else None

    def revoke_token(self, token_id: str, now: float) -> bool:
        """Make a token worthless, and end what it was presented for; False when there is none of that id."""
        with self._transaction() as connection:
            found = connection.execute(
                "UPDATE tokens SET revoked = coalesce(revoked, ?) WHERE id = ?", (now, token_id)
            ).rowcount
            if found:
                self._bump()
            return bool(found)

    def reusable(self, text: str, token: ReusableToken, now: float) -> str:
        """Why a reusable token is worthless though its signature holds; empty when it is good."""
        rows = self._rows(f"SELECT {_FIELDS}, secret_sha256 FROM tokens WHERE id = ?", token.id)
        if not rows:
            return f"the token {token.id} is not listed"
        record = _record(rows[0][:-1])
        if record.kind != "reusable" or not secrets.compare_digest(rows[0][-1], tokens.secret_hash(text)):
            return f"the token {token.id} is another's"
        return "" if record.state(now) == "valid" else f"the token {token.id} is {record.state(now)}"

    def redeem(self, secret: str, key_sha256: str | None, now: float) -> Redemption:
        """Spend a one-time token, durably, before anything is issued for it.

        The same key may come again within a minute: its answer may have been lost.

        Args:
            secret: what was presented.
            key_sha256: hash of the key that a certificate is asked for; None only looks whether some key could have
                one, and spends nothing.
            now: seconds since 1970.
        """
        token_id = tokens.split_secret(secret)
        if token_id is None:
            return Redemption(token=None, reason="not a one-time token")
        given = tokens.secret_hash(secret)
        with self._transaction() as connection:
            row = connection.execute(
                f"SELECT {_FIELDS}, secret_sha256, spent_key_sha256 FROM tokens WHERE id = ?", (token_id,)
            ).fetchone()
            if row is None or not secrets.compare_digest(row[-2], given) or row[1] != "one-time":
                return Redemption(token=None, reason="an unknown one-time token")
            record = _record(row[:-2])
            if record.revoked is not None or now >= record.expires:
                return Redemption(token=None, reason=f"the one-time token {record.id} is {record.state(now)}")
            if record.spent is None:
                if key_sha256 is not None:
                    connection.execute(
                        "UPDATE tokens SET spent = ?, spent_key_sha256 = ? WHERE id = ?", (now, key_sha256, record.id)
                    )
            elif key_sha256 not in (None, row[-1]) or not 0 <= now - record.spent <= RETRY_SECONDS:
                return Redemption(token=None, reason=f"the one-time token {record.id} was used already")
            return Redemption(token=record)


def _record(row: Any) -> TokenRecord:
    return TokenRecord(**fields_of(_FIELDS, row))
