"""Peer, destination and policies -> Decision. Source: Istio, ztunnel's order of evaluation.

Policies are compiled to closures once, when they arrive; a connection then costs one call a policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ztunnel.errors import PolicyRejected
from ztunnel.mesh.policy import Action, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hbone.identity import SpiffeId
    from ztunnel.mesh.address import Address, IpAddress, IpNetwork
    from ztunnel.mesh.policy import Authorization, Clause, Match, Rule, ServiceAccount, StringMatch
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload

__all__ = ["Connection", "Decision", "PolicySet", "compile_policy", "decide", "evaluate"]


class Connection:
    """What a policy may look at; made once per connection and kept for the checks after changes of policy.

    Args:
        source_ip: The TCP peer: the client, or the waypoint before us; never what `forwarded` says.
        identity: What the peer proved in TLS; None for plaintext.
        destination: Where the proxy will connect to, after an application tunnel's port.
    """

    __slots__ = (
        "destination",
        "destination_ip",
        "destination_port",
        "identity",
        "namespace",
        "principal",
        "service_account",
        "source_ip",
    )

    def __init__(self, source_ip: IpAddress, identity: SpiffeId | None, destination: Address) -> None:
        self.source_ip = source_ip
        self.identity = identity
        self.destination = destination
        self.destination_ip, self.destination_port = destination
        self.principal: str | None = None
        self.namespace = ""
        self.service_account: tuple[str, str] | None = None
        if identity is not None:
            self.principal = identity.trust_domain + identity.path
            account = identity.service_account
            if account is not None:
                self.namespace = identity.namespace or ""
                self.service_account = (self.namespace, account)

    def __repr__(self) -> str:
        return f"Connection({self.source_ip}, {self.identity}, {self.destination})"


@attrs.frozen
class Decision:
    """Whether a connection may be, and because of what."""

    allowed: bool
    policy: str | None
    """`namespace/name` of the policy that decided; None when there was none to do so."""
    reason: str
    """For people. For a refusal it is the text of the access log."""
    message: str
    """The line that ztunnel writes at debug level for this outcome."""
    dry_run: tuple[tuple[str, str | None], ...] = ()
    """Message and policy of each dry-run policy that had something to say. They changed nothing."""

    def error(self) -> PolicyRejected:
        """The error that a refused connection ends with."""
        return PolicyRejected(self.reason)


@attrs.frozen
class PolicySet:
    """The policies of one workload, each with its label and its compiled form, in the order of evaluation."""

    policies: tuple[Authorization, ...] = ()
    missing: tuple[str, ...] = ()
    """Names that the workload gives and nobody sent; they neither allow nor deny."""
    unusable: tuple[tuple[str, str], ...] = ()
    """Label and reason of policies that could not be read; they deny."""
    dry_deny: tuple[tuple[str, Callable[[Connection], bool]], ...] = ()
    deny: tuple[tuple[str, Callable[[Connection], bool]], ...] = ()
    dry_allow: tuple[tuple[str, Callable[[Connection], bool]], ...] = ()
    allow: tuple[tuple[str, Callable[[Connection], bool]], ...] = ()

    @classmethod
    def of(
        cls, policies: Iterable[tuple[Authorization, Callable[[Connection], bool]]], missing: Sequence[str] = ()
    ) -> PolicySet:
        """Sort policies into their groups; within each the order stays."""
        everything: list[Authorization] = []
        unusable: list[tuple[str, str]] = []
        groups: dict[tuple[Action, bool], list[tuple[str, Callable[[Connection], bool]]]] = {
            (action, dry): [] for action in Action for dry in (False, True)
        }
        for policy, matcher in policies:
            everything.append(policy)
            if policy.unusable:
                unusable.append((policy.label, policy.unusable))
            else:
                groups[policy.action, policy.dry_run].append((policy.label, matcher))
        return cls(
            policies=tuple(everything),
            missing=tuple(missing),
            unusable=tuple(unusable),
            dry_deny=tuple(groups[Action.DENY, True]),
            deny=tuple(groups[Action.DENY, False]),
            dry_allow=tuple(groups[Action.ALLOW, True]),
            allow=tuple(groups[Action.ALLOW, False]),
        )


_NO_ALLOW = Decision(True, None, "no allow policies", "no allow policies, allow")
_NONE_ALLOWED = Decision(False, None, "allow policies exist, but none allowed", "no allow policies matched")


def decide(store: Store, workload: Workload, connection: Connection) -> Decision:
    """Whether `connection` may reach `workload`, by the policies that the store holds now.

    Source: Istio, ztunnel: deny before allow; without an allow policy everything else is allowed.
    """
    return evaluate(store.policies_for(workload), connection)


def evaluate(policies: PolicySet, connection: Connection) -> Decision:
    """The decision of one set of policies."""
    if policies.unusable:
        label, why = policies.unusable[0]
        reason = f"policy {label} could not be read and denies until it is mended: {why}"
        return Decision(False, label, reason, "unusable policy, deny")
    dry_run: tuple[tuple[str, str | None], ...] = ()
    if policies.dry_deny:
        dry_run = tuple(
            ("dry-run: deny policy match", label) for label, matches in policies.dry_deny if matches(connection)
        )
    for label, matches in policies.deny:
        if matches(connection):
            return Decision(False, label, f"explicitly denied by: {label}", "deny policy match", dry_run)
    if policies.dry_allow:
        matched: tuple[tuple[str, str | None], ...] = tuple(
            ("dry-run: allow policy match", label) for label, matches in policies.dry_allow if matches(connection)
        )
        if not matched and not policies.allow:
            matched = (("dry-run: no allow policies match", None),)
        dry_run += matched
    if not policies.allow:
        return attrs.evolve(_NO_ALLOW, dry_run=dry_run) if dry_run else _NO_ALLOW
    for label, matches in policies.allow:
        if matches(connection):
            return Decision(True, label, f"allowed by: {label}", "allow policy match", dry_run)
    return attrs.evolve(_NONE_ALLOWED, dry_run=dry_run) if dry_run else _NONE_ALLOWED


def compile_policy(rules: Sequence[Rule]) -> Callable[[Connection], bool]:
    """One test for the rules of a policy: rules are OR, their clauses AND, a clause's matches OR, its fields AND."""
    return _any([_rule(rule) for rule in rules])


def _never(_: Connection) -> bool:
    return False


def _always(_: Connection) -> bool:
    return True


def _any(tests: list[Callable[[Connection], bool]]) -> Callable[[Connection], bool]:
    if not tests:
        return _never
    if len(tests) == 1:
        return tests[0]
    frozen = tuple(tests)

    def test(connection: Connection) -> bool:
        for one in frozen:  # noqa: SIM110 - a loop costs half of any() with a generator
            if one(connection):
                return True
        return False

    return test


def _all(tests: list[Callable[[Connection], bool]]) -> Callable[[Connection], bool]:
    if not tests:
        return _always
    if len(tests) == 1:
        return tests[0]
    frozen = tuple(tests)

    def test(connection: Connection) -> bool:
        for one in frozen:  # noqa: SIM110 - as above
            if not one(connection):
                return False
        return True

    return test


def _not(test: Callable[[Connection], bool]) -> Callable[[Connection], bool]:
    return lambda connection: not test(connection)


def _rule(clauses: Rule) -> Callable[[Connection], bool]:
    return _all([_clause(clause) for clause in clauses])


def _clause(matches: Clause) -> Callable[[Connection], bool]:
    return _any([_match(match) for match in matches]) if matches else _always


def _match(match: Match) -> Callable[[Connection], bool]:
    tests: list[Callable[[Connection], bool]] = []
    # Cheap and selective fields first; the order changes no result.
    if match.destination_ports:
        tests.append(_ports(match.destination_ports))
    if match.not_destination_ports:
        tests.append(_not(_ports(match.not_destination_ports)))
    if match.principals:
        tests.append(_principals(match.principals))
    if match.not_principals:
        tests.append(_not(_principals(match.not_principals)))
    if match.namespaces:
        tests.append(_namespaces(match.namespaces))
    if match.not_namespaces:
        tests.append(_not(_namespaces(match.not_namespaces)))
    if match.service_accounts:
        tests.append(_service_accounts(match.service_accounts))
    if match.not_service_accounts:
        tests.append(_not(_service_accounts(match.not_service_accounts)))
    if match.source_ips:
        tests.append(_source_ips(match.source_ips))
    if match.not_source_ips:
        tests.append(_not(_source_ips(match.not_source_ips)))
    if match.destination_ips:
        tests.append(_destination_ips(match.destination_ips))
    if match.not_destination_ips:
        tests.append(_not(_destination_ips(match.not_destination_ips)))
    return _all(tests) if tests else _never


def _ports(ports: tuple[int, ...]) -> Callable[[Connection], bool]:
    accepted = frozenset(ports)
    return lambda connection: connection.destination_port in accepted


def _texts(matches: tuple[StringMatch, ...]) -> tuple[frozenset[str], tuple[str, ...], tuple[str, ...], bool]:
    return (
        frozenset(match.text for match in matches if match.kind is Kind.EXACT),
        tuple(match.text for match in matches if match.kind is Kind.PREFIX),
        tuple(match.text for match in matches if match.kind is Kind.SUFFIX),
        any(match.kind is Kind.PRESENCE for match in matches),
    )


def _text_test(matches: tuple[StringMatch, ...]) -> Callable[[str], bool]:
    exact, prefixes, suffixes, presence = _texts(matches)
    if not prefixes and not suffixes and not presence:
        return exact.__contains__

    def test(value: str) -> bool:
        return (
            value in exact
            or (presence and value != "")
            or value.startswith(prefixes)  # an empty tuple never matches
            or value.endswith(suffixes)
        )

    return test


def _principals(matches: tuple[StringMatch, ...]) -> Callable[[Connection], bool]:
    test = _text_test(matches)

    def matched(connection: Connection) -> bool:
        return connection.principal is not None and test(connection.principal)

    return matched


def _namespaces(matches: tuple[StringMatch, ...]) -> Callable[[Connection], bool]:
    test = _text_test(matches)
    return lambda connection: test(connection.namespace)


def _service_accounts(accounts: tuple[ServiceAccount, ...]) -> Callable[[Connection], bool]:
    accepted = frozenset((account.namespace, account.name) for account in accounts)
    return lambda connection: connection.service_account in accepted


def _networks(networks: tuple[IpNetwork, ...]) -> Callable[[IpAddress], bool]:
    compiled = tuple(
        (network.version, network.max_prefixlen - network.prefixlen, int(network.network_address))
        for network in networks
    )
    shifted = tuple((version, shift, number >> shift) for version, shift, number in compiled)

    def test(ip: IpAddress) -> bool:
        number = int(ip)
        family = ip.version
        for version, shift, prefix in shifted:  # noqa: SIM110 - as above
            if family == version and number >> shift == prefix:
                return True
        return False

    return test


def _source_ips(networks: tuple[IpNetwork, ...]) -> Callable[[Connection], bool]:
    test = _networks(networks)
    return lambda connection: test(connection.source_ip)


def _destination_ips(networks: tuple[IpNetwork, ...]) -> Callable[[Connection], bool]:
    test = _networks(networks)
    return lambda connection: test(connection.destination_ip)
