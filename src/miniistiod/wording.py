"""Policies in words, as people say them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ztunnel.mesh.policy import Kind, ServiceAccount, StringMatch

if TYPE_CHECKING:
    from ztunnel.mesh.policy import Authorization, Clause, Match

__all__ = ["says"]


def says(policy: Authorization) -> str:
    """The rules of a policy in words."""
    return (
        "; or ".join(" and ".join(sorted(map(_clause, rule), key=_is_to)) or "anyone" for rule in policy.rules)
        or "nobody"
    )


def _is_to(text: str) -> bool:
    """Who comes before where, which is not their order on the wire."""
    return text.startswith("to ")


def _clause(clause: Clause) -> str:
    found = [_match(match) for match in clause]
    return f"({' or '.join(found)})" if len(found) > 1 else "".join(found) or "anything"


_FIELDS = (
    ("principals", "identity"),
    ("namespaces", "from namespace"),
    ("service_accounts", "from account"),
    ("source_ips", "from address"),
    ("destination_ips", "to address"),
    ("destination_ports", "to port"),
)


def _match(match: Match) -> str:
    found = []
    for name, words in _FIELDS:
        for field, no in ((name, ""), (f"not_{name}", "not ")):
            values = [_value(value) for value in getattr(match, field)]
            if values == ["any"]:
                found.append(f"{'no' if no else 'any'} {words.removeprefix('from ')}")
            elif values:
                found.append(f"{no}{words} {' or '.join(values)}")
    return " and ".join(found) or "nothing that a ztunnel sees"


def _value(value: object) -> str:
    if isinstance(value, ServiceAccount):
        return f"{value.namespace}/{value.name}"
    if not isinstance(value, StringMatch):
        return str(value)
    return {Kind.EXACT: value.text, Kind.PREFIX: f"{value.text}*", Kind.SUFFIX: f"*{value.text}", Kind.PRESENCE: "any"}[
        value.kind
    ]
