"""Reference cases of policy conversion, and a short notation for what they become.

A rule is a line: clauses are separated by ` ; `, the matches of a clause by ` | `, an empty match is `{}`. Of texts,
`=x` is exact, `^x` a prefix, `$x` a suffix, `+` any. P principals, N namespaces, SA service accounts, S source
addresses, D destination addresses, dp destination ports; `!` before a field that must not match.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztunnel.wire import authorization_pb2 as pb

__all__ = ["PEER_CASES", "POLICY_CASES", "expand"]


def expand(rule: pb.Rule) -> str:
    """A rule in the short notation."""
    return " ; ".join(" | ".join(_match(match) for match in clause.matches) for clause in rule.clauses)


def _match(match: pb.Match) -> str:
    def texts(values: object) -> list[str]:
        return [_text(value) for value in values]  # type: ignore[attr-defined]

    def networks(values: object) -> list[str]:
        return [f"{ipaddress.ip_address(v.address)}/{v.length}" for v in values]  # type: ignore[attr-defined]

    def accounts(values: object) -> list[str]:
        return [f"{v.namespace}/{v.serviceAccount}" for v in values]  # type: ignore[attr-defined]

    fields = {
        "dp": [str(port) for port in match.destination_ports],
        "!dp": [str(port) for port in match.not_destination_ports],
        "N": texts(match.namespaces),
        "!N": texts(match.not_namespaces),
        "P": texts(match.principals),
        "!P": texts(match.not_principals),
        "SA": accounts(match.service_accounts),
        "!SA": accounts(match.not_service_accounts),
        "S": networks(match.source_ips),
        "!S": networks(match.not_source_ips),
        "D": networks(match.destination_ips),
        "!D": networks(match.not_destination_ips),
    }
    return ", ".join(f"{name} {' '.join(values)}" for name, values in fields.items() if values) or "{}"


def _text(value: pb.StringMatch) -> str:
    kind = value.WhichOneof("match_type")
    signs = {"exact": f"={value.exact}", "prefix": f"^{value.prefix}", "suffix": f"${value.suffix}"}
    return signs.get(kind or "", "+")


def _policy(name: str, action: str, rules: str) -> str:
    head = f"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: cfg}}\n"
    return f"{head}spec:\n  action: {action}\n  rules:\n{rules}"


_FULL = """
  - from: [{source: {principals: [principal, 'principal-prefix-*', '*-suffix-principal', '*'], notPrincipals:
      [not-principal, 'not-principal-prefix-*', '*-suffix-not-principal', '*']}}]
  - from: [{source: {serviceAccounts: [ns/sa, sa-only], notServiceAccounts: [ns/sa-not, sa-not-only]}}]
  - from: [{source: {requestPrincipals: [x], notRequestPrincipals: [y]}}]
  - from: [{source: {namespaces: [ns, 'ns-prefix-*', '*-ns-suffix', '*'], notNamespaces:
      [not-ns, 'not-ns-prefix-*', '*-not-ns-suffix', '*']}}]
  - from: [{source: {ipBlocks: [1.2.3.4, 5.6.0.0/16], notIpBlocks: [2.2.3.4, 6.6.0.0/16]}}]
  - from: [{source: {remoteIpBlocks: [1.2.3.4], notRemoteIpBlocks: [2.2.3.4]}}]
  - to: [{operation: {methods: [GET], notMethods: [POST]}}]
  - to: [{operation: {hosts: [a], notHosts: [b]}}]
  - to: [{operation: {ports: ['80', '90'], notPorts: ['800', '900']}}]
  - to: [{operation: {paths: [/a], notPaths: [/b]}}]
  - when: [{key: 'request.headers[X-header]', values: [a], notValues: [b]}]
  - when: [{key: source.ip, values: [10.10.10.10, 192.168.10.0/24], notValues: [90.10.10.10, 90.168.10.0/24]}]
  - when: [{key: remote.ip, values: [10.10.10.10], notValues: [90.10.10.10]}]
  - when: [{key: source.namespace, values: [ns, 'ns-prefix-*', '*-ns-suffix', '*'], notValues:
      [not-ns, 'not-ns-prefix-*', '*-not-ns-suffix', '*']}]
  - when: [{key: source.principal, values: [principal, 'principal-prefix-*', '*-suffix-principal', '*'], notValues:
      [not-principal, 'not-principal-prefix-*', '*-not-suffix-principal', '*']}]
  - when: [{key: request.auth.principal, values: [a]}]
  - when: [{key: request.auth.audiences, values: [a]}]
  - when: [{key: request.auth.presenter, values: [a]}]
  - when: [{key: 'request.auth.claims[iss]', values: [a]}]
  - when: [{key: 'request.auth.claims[nested1][nested2]', values: [a]}]
  - when: [{key: destination.ip, values: [10.10.10.10, 192.168.10.0/24], notValues: [90.10.10.10, 90.168.10.0/24]}]
  - when: [{key: destination.port, values: ['91', '92'], notValues: ['9001', '9002']}]
  - when: [{key: connection.sni, values: [a]}]
  - when: [{key: 'experimental.envoy.filters.a.b[c]', values: [a]}]
"""
_GROUPS = """
  - from: [{source: {principals: [from-mix-principal], requestPrincipals: [x], namespaces: [from-mix-ns]}}]
    to: [{operation: {ports: ['80']}}]
  - from: [{source: {principals: [to-mix-principal], namespaces: [to-mix-ns]}}]
    to: [{operation: {ports: ['80'], methods: [GET]}}]
  - from: [{source: {principals: [only-l4-principals], namespaces: [only-l4-ns]}}]
    to: [{operation: {ports: ['80']}}]
  - from: [{source: {requestPrincipals: [x]}}]
    to: [{operation: {paths: [/a], methods: [GET]}}]
  - when: [{key: source.namespace, values: [when-l4-l7-ns]}, {key: connection.sni, values: [a]}]
  - when: [{key: source.namespace, values: [when-l4-ns]}, {key: source.ip, values: [10.10.10.10]NOT}]
  - when: [{key: connection.sni, values: [a]}, {key: 'request.headers[a]', values: [b]}]
"""
_P = "P =principal ^principal-prefix- $-suffix-principal +"
_N = "N =ns ^ns-prefix- $-ns-suffix +, !N =not-ns ^not-ns-prefix- $-not-ns-suffix +"
_S = "S 10.10.10.10/32 192.168.10.0/24, !S 90.10.10.10/32 90.168.10.0/24"

POLICY_CASES = {
    "allow-full": (
        _policy("allow", "ALLOW", _FULL),
        [
            f"{_P}, !P =not-principal ^not-principal-prefix- $-suffix-not-principal +",
            "SA ns/sa cfg/sa-only, !SA ns/sa-not cfg/sa-not-only",
            _N,
            "S 1.2.3.4/32 5.6.0.0/16, !S 2.2.3.4/32 6.6.0.0/16",
            "dp 80 90, !dp 800 900",
            _S,
            _N,
            f"{_P}, !P =not-principal ^not-principal-prefix- $-not-suffix-principal +",
            _S.replace("S ", "D "),
            "dp 91 92, !dp 9001 9002",
        ],
    ),
    "allow-groups": (
        _policy("groups", "ALLOW", _GROUPS.replace("NOT", "")),
        ["dp 80 ; N =only-l4-ns, P =only-l4-principals", "N =when-l4-ns ; S 10.10.10.10/32"],
    ),
    "deny-groups": (
        _policy("groups-deny", "DENY", _GROUPS.replace("NOT", ", notValues: [20.20.20.20]")),
        [
            "dp 80 ; N =from-mix-ns, P =from-mix-principal",
            "dp 80 ; N =to-mix-ns, P =to-mix-principal",
            "dp 80 ; N =only-l4-ns, P =only-l4-principals",
            "{} ; {}",
            "N =when-l4-l7-ns ; {}",
            "N =when-l4-ns ; S 10.10.10.10/32, !S 20.20.20.20/32",
            "{} ; {}",
        ],
    ),
}

_MODES = {"S": "STRICT", "P": "PERMISSIVE", "D": "DISABLE", "U": "UNSET"}


def _peers(workload: str = "", ports: str = "", namespace: str = "", root: str = "") -> str:
    """PeerAuthentications in short: a mode by its letter, ports as `9090S 8080P`."""
    texts: list[str] = []
    for place, letter in (("istio-system", root), ("foo", namespace)):
        if letter:
            texts.append(_peer("default", place, f"mtls: {{mode: {_MODES[letter]}}}"))
    if workload:
        pairs = ", ".join(f"{item[:-1]}: {{mode: {_MODES[item[-1]]}}}" for item in ports.split())
        level = f", portLevelMtls: {{{pairs}}}" if pairs else ""
        texts.append(
            _peer("w", "foo", f"selector: {{matchLabels: {{app: a}}}}, mtls: {{mode: {_MODES[workload]}}}{level}")
        )
    return "---\n".join(texts)


def _peer(name: str, namespace: str, spec: str) -> str:
    head = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
    return f"{head}metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"


PEER_CASES = {
    "disable": (_peers(namespace="D"), []),
    "disable-port-mtls-strict": (_peers("D", "9090S"), ["dp 9090, !P +"]),
    "permissive": (_peers(namespace="P"), []),
    "permissive-port-mtls-strict": (_peers("P", "9090S"), ["dp 9090, !P +"]),
    "permissive-port-mtls-strict-and-permissive": (_peers("P", "9090S 8080P"), ["dp 9090, !P +"]),
    "permissive-root-permissive-namespace-strict-workload-ports": (
        _peers("U", "9090S 8080S", namespace="P", root="P"),
        ["dp 8080, !P +", "dp 9090, !P +"],
    ),
    "permissive-root-permissive-workload": (_peers("U", "9090P", root="P"), []),
    "permissive-root-strict-namespace-permissive-workload": (
        _peers("U", "9090P", namespace="S", root="P"),
        ["!dp 9090 ; !P +"],
    ),
    "permissive-root-unset-namespace-mixed-workload-ports": (
        _peers("U", "9090S 8080P", namespace="U", root="P"),
        ["dp 9090, !P +"],
    ),
    "strict": (_peers(namespace="S"), []),
    "strict-workload": (_peers("S"), []),
    "strict-and-strict-port-mtls": (_peers("S", "8080S"), []),
    "strict-and-permissive-port-mtls": (_peers("S", "9090P"), ["!P + ; !dp 9090"]),
    "strict-and-disable-port-mtls": (_peers("S", "9090D"), ["!P + ; !dp 9090"]),
    "strict-port-mtls-strict-and-permissive": (_peers("S", "9090S 8080P"), ["!P + ; !dp 8080"]),
    "strict-root-permissive-namespace-strict-workload": (
        _peers("U", "9090S", namespace="P", root="S"),
        ["dp 9090, !P +"],
    ),
    "strict-root-permissive-workload": (_peers("U", "9090P", root="S"), ["!dp 9090 ; !P +"]),
    "strict-root-unset-workload-port-mtls-strict-and-permissive": (
        _peers("U", "9090P 8080S", root="S"),
        ["!dp 9090 ; !P +"],
    ),
    "unset-port-mtls-strict": (_peers("U", "8080S"), ["dp 8080, !P +"]),
}
