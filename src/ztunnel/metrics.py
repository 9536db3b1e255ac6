"""Counters under Istio's names. A connection finds its counters once; after that each is an addition.

`Metrics` is also a collector of prometheus_client, so that a program that embeds us can register it.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Final

import attrs

from ztunnel.errors import ResponseFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from hbone.connect import Baggage
    from hbone.identity import SpiffeId
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.workload import Workload

__all__ = ["MAX_SERIES", "Counts", "DnsKey", "Labels", "Metrics", "Traffic"]

MAX_SERIES: Final = 4096
"""Label sets of connections that are told apart. Baggage of peers decides labels, and must not fill our memory."""

_UNKNOWN: Final = "unknown"
_SOURCE: Final = (
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
)
_DESTINATION: Final = (
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
)
_LOCALITY: Final = ("source_region", "source_zone", "destination_region", "destination_zone")

Labels = tuple[str, tuple[str, ...], tuple[str, ...], str, tuple[str, ...]]
"""Reporter, source, destination, security policy, locality (empty when nothing is known)."""
DnsKey = tuple[tuple[str, ...], str]
"""Source and host name."""


@attrs.frozen
class Sample:
    """One value of a family."""

    name: str
    labels: Mapping[str, str]
    value: float


@attrs.define
class Family:
    """A metric by name, as the page shows it."""

    name: str
    documentation: str
    type: str
    samples: list[Sample] = attrs.field(factory=list)

    def add_sample(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """One value more."""
        self.samples.append(Sample(name, labels, value))


class Traffic:
    """The counters of one label set; shared by all its connections.

    `received` counts bytes from the downstream peer to the upstream, `sent` the others, for both reporters.
    """

    __slots__ = ("closed_by_flag", "failed_by_flag", "labels", "opened_count", "received_bytes", "sent_bytes")

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.opened_count = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.closed_by_flag: dict[ResponseFlag, int] = {}
        self.failed_by_flag: dict[ResponseFlag, int] = {}

    def opened(self) -> None:
        """A connection's record was made."""
        self.opened_count += 1

    def received(self, nbytes: int) -> None:
        """Bytes were written to the upstream."""
        self.received_bytes += nbytes

    def sent(self, nbytes: int) -> None:
        """Bytes were written to the downstream peer."""
        self.sent_bytes += nbytes

    def closed(self, flag: ResponseFlag = ResponseFlag.NONE) -> None:
        """A connection ended; with another flag than `-` it also counts as failed."""
        self.closed_by_flag[flag] = self.closed_by_flag.get(flag, 0) + 1
        if flag is not ResponseFlag.NONE:
            self.failed_by_flag[flag] = self.failed_by_flag.get(flag, 0) + 1

    def add(self, other: Traffic) -> None:
        """Add what another process counted."""
        self.opened_count += other.opened_count
        self.received_bytes += other.received_bytes
        self.sent_bytes += other.sent_bytes
        for mine, others in (
            (self.closed_by_flag, other.closed_by_flag),
            (self.failed_by_flag, other.failed_by_flag),
        ):
            for flag, count in others.items():
                mine[flag] = mine.get(flag, 0) + count

    def label_dict(self, flag: ResponseFlag) -> dict[str, str]:
        """All labels in Istio's order."""
        reporter, source, destination, policy, locality = self.labels
        return {
            "reporter": reporter,
            **dict(zip(_SOURCE, source, strict=True)),
            **dict(zip(_DESTINATION, destination, strict=True)),
            "request_protocol": "tcp",
            "response_flags": flag.value,
            "connection_security_policy": policy,
            **(dict(zip(_LOCALITY, locality, strict=True)) if locality else {}),
        }


_DNS: Final = ("request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision")
_DNS_BOUNDS: Final = (0.0005, 0.001, 0.01, 0.1, 1.0, 5.0)


class _Forwarding:
    """DNS questions of one label set that were handed on: how many failed, and how long they took, in seconds."""

    __slots__ = ("buckets", "count", "failures", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * len(_DNS_BOUNDS)
        self.count = 0
        self.failures = 0
        self.seconds = 0.0


@attrs.define
class Counts:
    """What a data path counted."""

    traffic: dict[Labels, Traffic] = attrs.field(factory=dict)
    sockets: dict[str, int] = attrs.field(factory=dict)
    """Open now, by reporter."""
    on_demand: dict[DnsKey, int] = attrs.field(factory=dict)
    policy_closed: int = 0
    overflow: int = 0
    crl_rejected: dict[str, int] = attrs.field(factory=dict)
    """Tunnels refused or closed for a revoked certificate, by reporter."""
    crl_untracked: dict[str, int] = attrs.field(factory=dict)

    def add(self, other: Counts) -> None:
        """Add what another data path counted."""
        for labels, traffic in other.traffic.items():
            mine = self.traffic.get(labels)
            if mine is None:
                mine = self.traffic[labels] = Traffic(labels)
            mine.add(traffic)
        for reporter, count in other.sockets.items():
            self.sockets[reporter] = self.sockets.get(reporter, 0) + count
        for key, count in other.on_demand.items():
            self.on_demand[key] = self.on_demand.get(key, 0) + count
        self.policy_closed += other.policy_closed
        self.overflow += other.overflow
        for mine_by, theirs_by in (
            (self.crl_rejected, other.crl_rejected),
            (self.crl_untracked, other.crl_untracked),
        ):
            for reporter, count in theirs_by.items():
                mine_by[reporter] = mine_by.get(reporter, 0) + count


class Metrics:
    """All counters of one proxy.

    Args:
        version: Version label of `istio_build`.
    """

    def __init__(self, version: str = _UNKNOWN) -> None:
        self._version = version
        self.counts = Counts()
        """Of the data path in this process."""
        self._recent: dict[Hashable, Traffic] = {}
        self._xds_ended: dict[str, int] = {}
        self._xds_messages: dict[str, int] = {}
        self._xds_bytes: dict[str, int] = {}
        self._dns_requests: dict[tuple[str, ...], int] = {}
        self._dns_forwarded: dict[tuple[str, ...], _Forwarding] = {}
        self._values: dict[str, tuple[str, str, Callable[[], float]]] = {}
        self._elsewhere: list[Callable[[], Counts]] = []
        self.before_reading: list[Callable[[], object]] = []
        """Called first, to bring counters up to date."""

    # Counting

    def connection(
        self,
        reporter: str,
        source: Workload | None,
        source_identity: SpiffeId | None,
        destination: Workload | None,
        service: Service | None,
        destination_identity: SpiffeId | None = None,
        security_policy: str = _UNKNOWN,
        baggage: Baggage | None = None,
    ) -> Traffic:
        """The counters of a connection. Called once per connection.

        Args:
            reporter: `source` or `destination`.
            source: The source's workload, if it was found.
            source_identity: What the source proved in TLS, or our own identity in an outbound tunnel.
            destination: The destination's workload.
            service: The service meant.
            destination_identity: Of the destination, if it is another than the workload's.
            security_policy: `mutual_tls` or `unknown`.
            baggage: What the far side's proxy says about it, the source's or with reporter `source` the destination's;
                used where its workload was not found.
        """
        key = (reporter, source, source_identity, destination, service, destination_identity, security_policy, baggage)
        found = self._recent.get(key)
        if found is None:
            labels = _labels(*key)
            found = self.counts.traffic.get(labels) or self._new(labels)
            if len(self._recent) >= MAX_SERIES:
                self._recent.clear()
            self._recent[key] = found
        return found

    def _new(self, labels: Labels) -> Traffic:
        series = self.counts.traffic
        if len(series) >= MAX_SERIES:
            self.counts.overflow += 1
            labels = (labels[0], (_UNKNOWN,) * len(_SOURCE), (_UNKNOWN,) * len(_DESTINATION), _UNKNOWN, ())
            if labels in series:
                return series[labels]
        traffic = series[labels] = self.make_traffic(labels)
        return traffic

    def make_traffic(self, labels: Labels) -> Traffic:
        """The counters of a label set that is new."""
        return Traffic(labels)

    def socket_opened(self, reporter: str) -> None:
        """A connection was accepted."""
        self.counts.sockets[reporter] = self.counts.sockets.get(reporter, 0) + 1

    def socket_closed(self, reporter: str) -> None:
        """An accepted connection is done with."""
        self.counts.sockets[reporter] = self.counts.sockets.get(reporter, 0) - 1

    def policy_closed(self) -> None:
        """A live connection was closed by a change of policy."""
        self.counts.policy_closed += 1

    def crl_rejected(self, reporter: str) -> None:
        """A tunnel was refused or closed because its peer's certificate was revoked."""
        self.counts.crl_rejected[reporter] = self.counts.crl_rejected.get(reporter, 0) + 1

    def crl_untracked(self, reporter: str) -> None:
        """A live tunnel's certificates could not be looked up in the revocation lists."""
        self.counts.crl_untracked[reporter] = self.counts.crl_untracked.get(reporter, 0) + 1

    def on_demand_dns(self, source: Workload, hostname: str) -> None:
        """The host name of a workload was resolved for a connection."""
        self.name_resolved((_source_labels(source, source.identity), hostname))

    def name_resolved(self, key: DnsKey) -> None:
        """The same, by its labels."""
        counts = self.counts.on_demand
        if key in counts or len(counts) < MAX_SERIES:
            counts[key] = counts.get(key, 0) + 1

    def dns_request(self, query_type: str, protocol: str, source: Workload | None) -> None:
        """A DNS question came in.

        Args:
            query_type: In lower case, one of few.
            protocol: `udp` or `tcp`.
            source: Workload of who asks, if it is known.
        """
        labels = _dns_labels(query_type, protocol, source)
        self._dns_requests[labels] = self._dns_requests.get(labels, 0) + 1

    def dns_forwarded(
        self, query_type: str, protocol: str, source: Workload | None, seconds: float, *, failed: bool
    ) -> None:
        """A DNS question was handed on to the host's resolver, and ended after `seconds`."""
        labels = _dns_labels(query_type, protocol, source)
        found = self._dns_forwarded.get(labels)
        if found is None:
            found = self._dns_forwarded[labels] = _Forwarding()
        found.count += 1
        found.failures += failed
        found.seconds += seconds
        for number, bound in enumerate(_DNS_BOUNDS):
            if seconds <= bound:
                found.buckets[number] += 1

    def xds_message(self, url: str, nbytes: int) -> None:
        """A response of discovery arrived, with `nbytes` of resources."""
        self._xds_messages[url] = self._xds_messages.get(url, 0) + 1
        self._xds_bytes[url] = self._xds_bytes.get(url, 0) + nbytes

    def xds_terminated(self, reason: str) -> None:
        """A stream of discovery ended: ConnectionError, Error, Reconnect or Complete."""
        self._xds_ended[reason] = self._xds_ended.get(reason, 0) + 1

    def add_gauge(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Show a value of another part of the program; `read` is called at each scrape."""
        self._values[name] = (meaning, "gauge", read)

    def add_counter(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """The same, for a value that only grows; `name` is without `_total`."""
        self._values[name] = (meaning, "counter", read)

    def add_counts(self, read: Callable[[], Counts]) -> None:
        """Show the sum with what other processes counted; `read` is called at each scrape."""
        self._elsewhere.append(read)

    # Showing

    def collect(self) -> Iterator[Metric]:
        """Families for prometheus_client; one without a sample is left out."""
        from prometheus_client.metrics_core import Metric  # megabytes that our own page does without

        for family in self._families():
            if family.samples:
                metric = Metric(family.name, family.documentation, family.type)
                for sample in family.samples:
                    metric.add_sample(sample.name, dict(sample.labels), sample.value)
                yield metric

    def describe(self) -> list[Metric]:
        """Nothing in advance; tells prometheus_client not to collect at registration."""
        return []

    def exposition(self, accept: str | Iterable[str] = "") -> tuple[str, bytes]:
        """Content type and body of a metrics page.

        Args:
            accept: Value or values of the request's Accept header.

        Source: OpenMetrics 1.0; Istio's label order, which prometheus_client would sort.
        """
        values = [accept] if isinstance(accept, str) else list(accept)
        items = [item.partition(";")[0].strip().lower() for value in values for item in value.split(",")]
        open_metrics = "application/openmetrics-text" in items
        content_type = (
            "application/openmetrics-text;charset=utf-8;version=1.0.0" if open_metrics else "text/plain; charset=utf-8"
        )
        lines: list[str] = []
        for family in self._families():
            if not family.samples:
                continue
            lines.append(f"# HELP {family.name} {_escape_help(family.documentation)}.")
            lines.append(f"# TYPE {family.name} {family.type}")
            for sample in family.samples:
                labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sample.labels.items())
                lines.append(f"{sample.name}{{{labels}}} {sample.value}" if labels else f"{sample.name} {sample.value}")
        lines.append("# EOF\n")
        return content_type, "\n".join(lines).encode()

    def _families(self) -> Iterator[Family]:
        for call in self.before_reading:
            call()
        build = Family("istio_build", "Istio component build info", "gauge")
        build.add_sample("istio_build", {"component": "ztunnel", "tag": self._version}, 1)
        yield build
        counts = self.counts
        if self._elsewhere:
            counts = Counts()
            for found in (self.counts, *(read() for read in self._elsewhere)):
                counts.add(found)
        yield from _traffic_families(counts)
        sockets = Family("istio_tcp_sockets_open", "Sockets that are open now (unstable)", "gauge")
        for reporter, count in counts.sockets.items():
            sockets.add_sample("istio_tcp_sockets_open", {"reporter": reporter}, count)
        yield sockets
        dns = _counter("istio_on_demand_dns", "Host names of workloads resolved for connections (unstable)")
        for (source, hostname), count in counts.on_demand.items():
            labels = {**dict(zip(_SOURCE, source, strict=True)), "hostname": hostname}
            dns.add_sample("istio_on_demand_dns_total", labels, count)
        yield dns
        yield _by_label(
            "istio_crl_policy_rejections",
            "Tunnels refused or closed for a revoked certificate (unstable)",
            "reporter",
            counts.crl_rejected,
        )
        yield _by_label(
            "istio_crl_untracked_connections",
            "Tunnels whose certificates could not be looked up in the revocation lists (unstable)",
            "reporter",
            counts.crl_untracked,
        )
        yield from self._dns_families()
        yield _by_label(
            "istio_xds_connection_terminations", "Discovery streams that ended (unstable)", "reason", self._xds_ended
        )
        yield _by_label("istio_xds_message", "Discovery responses received (unstable)", "url", self._xds_messages)
        yield _by_label(
            "istio_xds_message_bytes", "Bytes of discovery resources received (unstable)", "url", self._xds_bytes
        )
        yield _single(
            "ztunnel_policy_change_closures",
            "Live connections closed by a change of policy (unstable)",
            counts.policy_closed,
        )
        yield _single(
            "ztunnel_label_sets_merged",
            "Connections counted under unknown labels because there are too many label sets (unstable)",
            counts.overflow,
        )
        for name, (meaning, kind, read) in self._values.items():
            value = Family(name, f"{meaning} (unstable)", kind)
            value.add_sample(f"{name}_total" if kind == "counter" else name, {}, read())
            yield value
        yield from _process()

    def _dns_families(self) -> Iterator[Family]:
        requests = _counter("istio_dns_requests", "DNS questions received (unstable)")
        for labels, count in self._dns_requests.items():
            requests.add_sample("istio_dns_requests_total", dict(zip(_DNS, labels, strict=True)), count)
        upstream = _counter("istio_dns_upstream_requests", "DNS questions handed on to the resolver (unstable)")
        failures = _counter("istio_dns_upstream_failures", "DNS questions that the resolver failed (unstable)")
        name = "istio_dns_upstream_request_duration_seconds"
        duration = Family(name, "Time that the resolver took for a DNS question (unstable)", "histogram")
        for labels, found in self._dns_forwarded.items():
            named = dict(zip(_DNS, labels, strict=True))
            upstream.add_sample("istio_dns_upstream_requests_total", named, found.count)
            if found.failures:
                failures.add_sample("istio_dns_upstream_failures_total", named, found.failures)
            for bound, count in zip(_DNS_BOUNDS, found.buckets, strict=True):
                duration.add_sample(f"{name}_bucket", {**named, "le": str(bound)}, count)
            duration.add_sample(f"{name}_bucket", {**named, "le": "+Inf"}, found.count)
            duration.add_sample(f"{name}_sum", named, found.seconds)
            duration.add_sample(f"{name}_count", named, found.count)
        yield from (requests, upstream, failures, duration)


def _traffic_families(counts: Counts) -> Iterator[Family]:
    opened = _counter("istio_tcp_connections_opened", "The total number of TCP connections opened")
    closed = _counter("istio_tcp_connections_closed", "The total number of TCP connections closed")
    failed = _counter("istio_tcp_connections_failed", "The total number of TCP connections that failed (unstable)")
    received = _counter(
        "istio_tcp_received_bytes", "The total number of bytes received from the client side of TCP connections"
    )
    sent = _counter("istio_tcp_sent_bytes", "The total number of bytes sent to the client side of TCP connections")
    for traffic in counts.traffic.values():
        labels = traffic.label_dict(ResponseFlag.NONE)
        opened.add_sample("istio_tcp_connections_opened_total", labels, traffic.opened_count)
        received.add_sample("istio_tcp_received_bytes_total", labels, traffic.received_bytes)
        sent.add_sample("istio_tcp_sent_bytes_total", labels, traffic.sent_bytes)
        for flag, count in traffic.closed_by_flag.items():
            closed.add_sample("istio_tcp_connections_closed_total", traffic.label_dict(flag), count)
        for flag, count in traffic.failed_by_flag.items():
            failed.add_sample("istio_tcp_connections_failed_total", traffic.label_dict(flag), count)
    yield from (opened, closed, failed, received, sent)


def _counter(name: str, documentation: str) -> Family:
    return Family(name, documentation, "counter")


def _single(name: str, documentation: str, value: int) -> Family:
    family = _counter(name, documentation)
    family.add_sample(f"{name}_total", {}, value)
    return family


def _by_label(name: str, documentation: str, label: str, values: Mapping[str, int]) -> Family:
    family = _counter(name, documentation)
    for key, value in values.items():
        family.add_sample(f"{name}_total", {label: key}, value)
    return family


def _process() -> Iterator[Family]:
    limit = Family("process_max_fds", "Maximum number of open file descriptors", "gauge")
    limit.add_sample("process_max_fds", {}, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield limit
    fds = Family("process_open_fds", "Number of open file descriptors", "gauge")
    try:
        fds.add_sample("process_open_fds", {}, len(os.listdir("/proc/self/fd")) - 1)  # less the listing's own
    except OSError:
        return  # no /proc: the family is left out
    yield fds


def _dns_labels(query_type: str, protocol: str, source: Workload | None) -> tuple[str, ...]:
    service, revision = (source.canonical_name, source.canonical_revision) if source is not None else ("", "")
    return (query_type, protocol, service or _UNKNOWN, revision or _UNKNOWN)


def _source_labels(
    workload: Workload | None, identity: SpiffeId | None, baggage: Baggage | None = None
) -> tuple[str, ...]:
    principal = str(identity) if identity is not None else ""
    return tuple(value or _UNKNOWN for value in _party_labels(workload, principal, baggage))


def _party_labels(workload: Workload | None, principal: str, baggage: Baggage | None) -> tuple[str, ...]:
    if workload is not None:
        return _workload_labels(workload, principal)
    if baggage is None:
        return ("", "", "", "", principal, "", "", "")
    return (
        baggage.workload_name or "",
        baggage.service_name or "",
        baggage.service_version or "",
        baggage.namespace or "",
        principal,
        baggage.workload_name or "",  # as ztunnel has it, though the app is elsewhere the canonical name
        baggage.service_version or "",
        baggage.cluster or "",
    )


def _workload_labels(workload: Workload, principal: str) -> tuple[str, ...]:
    return (
        workload.workload_name,
        workload.canonical_name,
        workload.canonical_revision,
        workload.namespace,
        principal,
        workload.canonical_name,
        workload.canonical_revision,
        workload.cluster_id,
    )


def _labels(
    reporter: str,
    source: Workload | None,
    source_identity: SpiffeId | None,
    destination: Workload | None,
    service: Service | None,
    destination_identity: SpiffeId | None,
    security_policy: str,
    baggage: Baggage | None,
) -> Labels:
    if destination_identity is None and destination is not None:
        destination_identity = destination.identity  # also for plaintext, as Istio has it
    principal = str(destination_identity) if destination_identity is not None else ""
    named = ("", "", "") if service is None else (service.hostname, service.namespace, service.name)
    said_here, said_there = (None, baggage) if reporter == "source" else (baggage, None)
    reached = _party_labels(destination, principal, said_there)
    locality: tuple[str, ...] = ()
    if source is not None or destination is not None or baggage is not None:
        places = (*_place(source, said_here), *_place(destination, said_there))
        locality = tuple(value or _UNKNOWN for value in places)
    return (
        reporter,
        _source_labels(source, source_identity, said_here),
        tuple(value or _UNKNOWN for value in (*named, *reached)),
        security_policy,
        locality,
    )


def _place(workload: Workload | None, baggage: Baggage | None) -> tuple[str, str]:
    if workload is not None:
        return workload.locality.region, workload.locality.zone
    return ((baggage.region or "", baggage.zone or "")) if baggage is not None else ("", "")


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _escape_help(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n")
