"""Counters under Istio's names. A connection finds its counters once; after that each is an addition.

`Metrics` is also a collector of prometheus_client, so that a program that embeds us can register it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from ztunnel import exposition
from ztunnel.errors import ResponseFlag
from ztunnel.exposition import Family, by_label, single
from ztunnel.labels import DNS, SOURCE, UNKNOWN, Labels, by_name, connection_labels, dns_labels, merged, source_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

    from prometheus_client.metrics_core import Metric

    from hbone.connect import Baggage
    from hbone.identity import SpiffeId
    from ztunnel.exposition import Sample
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.workload import Workload

__all__ = ["MAX_SERIES", "Counts", "DnsKey", "Labels", "Metrics", "Traffic"]

MAX_SERIES: Final = 4096
"""Label sets of connections that are told apart. Baggage of peers decides labels, and must not fill our memory."""

DnsKey = tuple[tuple[str, ...], str]
"""Source and host name."""


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
        return by_name(self.labels, flag)


_DNS_BOUNDS: Final = (0.0005, 0.001, 0.01, 0.1, 1.0, 5.0)


class _Forwarding:
    """DNS questions of one label set that were handed on: how many failed, and how long they took, in seconds."""

    __slots__ = ("buckets", "count", "failures", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * len(_DNS_BOUNDS)
        self.count = 0
        self.failures = 0
        self.seconds = 0.0

    def samples(self, labels: dict[str, str]) -> Iterator[Sample]:
        """Of a histogram."""
        name = "istio_dns_upstream_request_duration_seconds"
        for bound, count in zip(_DNS_BOUNDS, self.buckets, strict=True):
            yield f"{name}_bucket", {**labels, "le": str(bound)}, count
        yield f"{name}_bucket", {**labels, "le": "+Inf"}, self.count
        yield f"{name}_sum", labels, self.seconds
        yield f"{name}_count", labels, self.count


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

    def __init__(self, version: str = UNKNOWN) -> None:
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
        security_policy: str = UNKNOWN,
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
            labels = connection_labels(*key)
            found = self.counts.traffic.get(labels) or self._new(labels)
            if len(self._recent) >= MAX_SERIES:
                self._recent.clear()
            self._recent[key] = found
        return found

    def _new(self, labels: Labels) -> Traffic:
        series = self.counts.traffic
        if len(series) >= MAX_SERIES:
            self.counts.overflow += 1
            labels = merged(labels)
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
        self.name_resolved((source_labels(source, source.identity), hostname))

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
        labels = dns_labels(query_type, protocol, source)
        self._dns_requests[labels] = self._dns_requests.get(labels, 0) + 1

    def dns_forwarded(
        self, query_type: str, protocol: str, source: Workload | None, seconds: float, *, failed: bool
    ) -> None:
        """A DNS question was handed on to the host's resolver, and ended after `seconds`."""
        labels = dns_labels(query_type, protocol, source)
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

        for family in self.families():
            metric = Metric(family.name, family.documentation, family.type)
            for name, labels, value in family.samples:
                metric.add_sample(name, dict(labels), value)
            if metric.samples:
                yield metric

    def describe(self) -> list[Metric]:
        """Nothing in advance; tells prometheus_client not to collect at registration."""
        return []

    def exposition(self, accept: str | Iterable[str] = "") -> tuple[str, bytes]:
        """Content type and body of a metrics page.

        Args:
            accept: Value or values of the request's Accept header.
        """
        return exposition.content_type(accept), "".join(exposition.lines(self.families())).encode()

    def families(self) -> Iterator[Family]:
        """Everything that is counted. Samples are made when they are read, so a reader may take its time."""
        for call in self.before_reading:
            call()
        yield Family(
            "istio_build",
            "Istio component build info",
            "gauge",
            [("istio_build", {"component": "ztunnel", "tag": self._version}, 1)],
        )
        counts = self.counts
        if self._elsewhere:
            counts = Counts()
            for found in (self.counts, *(read() for read in self._elsewhere)):
                counts.add(found)
        yield from _traffic_families(list(counts.traffic.values()))
        yield Family(
            "istio_tcp_sockets_open",
            "Sockets that are open now (unstable)",
            "gauge",
            [("istio_tcp_sockets_open", {"reporter": reporter}, count) for reporter, count in counts.sockets.items()],
        )
        yield Family(
            "istio_on_demand_dns",
            "Host names of workloads resolved for connections (unstable)",
            "counter",
            (
                (
                    "istio_on_demand_dns_total",
                    {**dict(zip(SOURCE, source, strict=True)), "hostname": hostname},
                    count,
                )
                for (source, hostname), count in list(counts.on_demand.items())
            ),
        )
        yield by_label(
            "istio_crl_policy_rejections",
            "Tunnels refused or closed for a revoked certificate (unstable)",
            "reporter",
            counts.crl_rejected,
        )
        yield by_label(
            "istio_crl_untracked_connections",
            "Tunnels whose certificates could not be looked up in the revocation lists (unstable)",
            "reporter",
            counts.crl_untracked,
        )
        yield from self._dns_families()
        yield by_label(
            "istio_xds_connection_terminations", "Discovery streams that ended (unstable)", "reason", self._xds_ended
        )
        yield by_label("istio_xds_message", "Discovery responses received (unstable)", "url", self._xds_messages)
        yield by_label(
            "istio_xds_message_bytes", "Bytes of discovery resources received (unstable)", "url", self._xds_bytes
        )
        yield single(
            "ztunnel_policy_change_closures",
            "Live connections closed by a change of policy (unstable)",
            counts.policy_closed,
        )
        yield single(
            "ztunnel_label_sets_merged",
            "Connections counted under unknown labels because there are too many label sets (unstable)",
            counts.overflow,
        )
        for name, (meaning, kind, read) in list(self._values.items()):
            sample = f"{name}_total" if kind == "counter" else name
            yield Family(name, f"{meaning} (unstable)", kind, [(sample, {}, read())])
        yield from exposition.process()

    def _dns_families(self) -> Iterator[Family]:
        asked = [(dict(zip(DNS, labels, strict=True)), count) for labels, count in self._dns_requests.items()]
        yield Family(
            "istio_dns_requests",
            "DNS questions received (unstable)",
            "counter",
            [("istio_dns_requests_total", labels, count) for labels, count in asked],
        )
        forwarded = [(dict(zip(DNS, labels, strict=True)), found) for labels, found in self._dns_forwarded.items()]
        yield Family(
            "istio_dns_upstream_requests",
            "DNS questions handed on to the resolver (unstable)",
            "counter",
            [("istio_dns_upstream_requests_total", labels, found.count) for labels, found in forwarded],
        )
        yield Family(
            "istio_dns_upstream_failures",
            "DNS questions that the resolver failed (unstable)",
            "counter",
            [
                ("istio_dns_upstream_failures_total", labels, found.failures)
                for labels, found in forwarded
                if found.failures
            ],
        )
        yield Family(
            "istio_dns_upstream_request_duration_seconds",
            "Time that the resolver took for a DNS question (unstable)",
            "histogram",
            [sample for labels, found in forwarded for sample in found.samples(labels)],
        )


def _traffic_families(series: Sequence[Traffic]) -> Iterator[Family]:
    for what, meaning, read in (
        ("connections_opened", "The total number of TCP connections opened", lambda traffic: traffic.opened_count),
        ("connections_closed", "The total number of TCP connections closed", lambda traffic: traffic.closed_by_flag),
        (
            "connections_failed",
            "The total number of TCP connections that failed (unstable)",
            lambda traffic: traffic.failed_by_flag,
        ),
        (
            "received_bytes",
            "The total number of bytes received from the client side of TCP connections",
            lambda traffic: traffic.received_bytes,
        ),
        (
            "sent_bytes",
            "The total number of bytes sent to the client side of TCP connections",
            lambda traffic: traffic.sent_bytes,
        ),
    ):
        name = f"istio_tcp_{what}"
        yield Family(name, meaning, "counter", _traffic_samples(f"{name}_total", series, read))


def _traffic_samples(
    name: str, series: Sequence[Traffic], read: Callable[[Traffic], int | dict[ResponseFlag, int]]
) -> Iterator[Sample]:
    for traffic in series:
        found = read(traffic)
        if isinstance(found, int):
            yield name, traffic.label_dict(ResponseFlag.NONE), found
            continue
        for flag, count in list(found.items()):
            yield name, traffic.label_dict(flag), count
