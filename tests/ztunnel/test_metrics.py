from __future__ import annotations

import re

import pytest
import trio
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics import parser
from tests.support.mesh import hbone, service, tcp

from hbone.identity import SpiffeId
from ztunnel import metrics as module
from ztunnel.errors import ResponseFlag
from ztunnel.exposition import lines
from ztunnel.jsonstream import ENTRIES, collect_pieces
from ztunnel.labels import Labels, by_name
from ztunnel.mesh.workload import Locality
from ztunnel.metrics import Metrics, Traffic

SOURCE = hbone(
    "client-0", workload_name="client", canonical_name="cl", canonical_revision="v1", locality=Locality("r", "z")
)
TARGET = hbone("web-0", workload_name="web", canonical_name="web")
WEB = service("web")
STABLE = {
    "istio_build",
    "istio_tcp_connections_opened",
    "istio_tcp_connections_closed",
    "istio_tcp_received_bytes",
    "istio_tcp_sent_bytes",
    "process_max_fds",
    "process_open_fds",
}


SOURCE_LABELS = (
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
)
COMMON = (
    "reporter",
    *SOURCE_LABELS,
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
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
)
DNS = ("request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision")
ISTIOS = {
    "istio_build": ("gauge", ("component", "tag")),
    "istio_tcp_connections_opened_total": ("counter", COMMON),
    "istio_tcp_connections_closed_total": ("counter", COMMON),
    "istio_tcp_connections_failed_total": ("counter", COMMON),
    "istio_tcp_received_bytes_total": ("counter", COMMON),
    "istio_tcp_sent_bytes_total": ("counter", COMMON),
    "istio_tcp_sockets_open": ("gauge", ("reporter",)),
    "istio_on_demand_dns_total": ("counter", (*SOURCE_LABELS, "hostname")),
    "istio_crl_policy_rejections_total": ("counter", ("reporter",)),
    "istio_crl_untracked_connections_total": ("counter", ("reporter",)),
    "istio_dns_requests_total": ("counter", DNS),
    "istio_dns_upstream_requests_total": ("counter", DNS),
    "istio_dns_upstream_failures_total": ("counter", DNS),
    "istio_dns_upstream_request_duration_seconds_bucket": ("histogram", (*DNS, "le")),
    "istio_dns_upstream_request_duration_seconds_sum": ("histogram", DNS),
    "istio_dns_upstream_request_duration_seconds_count": ("histogram", DNS),
    "istio_xds_connection_terminations_total": ("counter", ("reason",)),
    "istio_xds_message_total": ("counter", ("url",)),
    "istio_xds_message_bytes_total": ("counter", ("url",)),
    "process_open_fds": ("gauge", ()),
    "process_max_fds": ("gauge", ()),
}
"""ztunnel's samples with their types and labels in order; without those of its runtime (tokio) and of in-pod mode."""


def page(metrics: Metrics) -> str:
    return metrics.exposition()[1].decode()


def families_of(metrics: Metrics) -> dict[str, Metric]:
    found = parser.text_string_to_metric_families(page(metrics))  # type: ignore[no-untyped-call]  # the library's
    return {family.name: family for family in found}


def outbound(metrics: Metrics) -> Traffic:
    return metrics.connection("source", SOURCE, SOURCE.identity, TARGET, WEB, None, "mutual_tls")


def test_labels_stand_in_istios_order() -> None:
    metrics = Metrics()
    outbound(metrics).opened()
    (line,) = [line for line in page(metrics).splitlines() if line.startswith("istio_tcp_connections_opened_total")]
    assert line == (
        'istio_tcp_connections_opened_total{reporter="source",source_workload="client",'
        'source_canonical_service="cl",source_canonical_revision="v1",source_workload_namespace="default",'
        'source_principal="spiffe://cluster.local/ns/default/sa/client-0",source_app="cl",source_version="v1",'
        'source_cluster="Kubernetes",destination_service="web.default.svc.cluster.local",'
        'destination_service_namespace="default",destination_service_name="web",destination_workload="web",'
        'destination_canonical_service="web",destination_canonical_revision="unknown",'
        'destination_workload_namespace="default",'
        'destination_principal="spiffe://cluster.local/ns/default/sa/web-0",destination_app="web",'
        'destination_version="unknown",destination_cluster="Kubernetes",request_protocol="tcp",response_flags="-",'
        'connection_security_policy="mutual_tls",source_region="r",source_zone="z",destination_region="unknown",'
        'destination_zone="unknown"} 1'
    )


def test_samples_have_ztunnels_names_types_and_labels() -> None:
    metrics = Metrics()
    traffic = outbound(metrics)
    traffic.opened()
    traffic.closed(ResponseFlag.CONNECT)
    metrics.socket_opened("source")
    metrics.on_demand_dns(SOURCE, "web.example")
    metrics.crl_rejected("source")
    metrics.crl_untracked("source")
    metrics.dns_request("a", "udp", SOURCE)
    metrics.dns_forwarded("a", "udp", SOURCE, 0.002, failed=True)
    metrics.xds_message("type", 5)
    metrics.xds_terminated("Complete")
    types: dict[str, str] = {}
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for line in page(metrics).splitlines():
        if line.startswith("# TYPE"):
            types[line.split()[2]] = line.split()[3]
        elif not line.startswith("#"):
            name, _, rest = line.partition(" ")[0].partition("{")
            family = re.sub("_(total|bucket|sum|count)$", "", name)
            found[name] = (types[family], tuple(re.findall(r'(?:^|,)(\w+)="', rest)))
    assert {name: what for name, what in found.items() if not name.startswith("ztunnel_")} == ISTIOS


def test_buckets_of_the_resolvers_time_are_ztunnels() -> None:
    metrics = Metrics()
    metrics.dns_forwarded("a", "udp", None, 0.05, failed=False)
    name = "istio_dns_upstream_request_duration_seconds_bucket"
    buckets = [line for line in page(metrics).splitlines() if line.startswith(name)]
    assert [re.findall('le="([^"]+)"} (.+)', line)[0] for line in buckets] == [
        (bound, str(int(float(bound) >= 0.05))) for bound in ("0.0005", "0.001", "0.01", "0.1", "1.0", "5.0", "+Inf")
    ]


def test_bytes_and_ends_are_counted_by_flag() -> None:
    metrics = Metrics()
    traffic = outbound(metrics)
    for _ in range(3):
        traffic.opened()
    traffic.received(11)
    traffic.sent(22)
    traffic.closed()
    traffic.closed(ResponseFlag.CONNECT)
    families = families_of(metrics)

    def values(name: str) -> dict[str, float]:
        return {sample.labels["response_flags"]: sample.value for sample in families[name].samples}

    assert values("istio_tcp_connections_opened") == {"-": 3}
    assert values("istio_tcp_connections_closed") == {"-": 1, "CONNECT": 1}
    assert values("istio_tcp_connections_failed") == {"CONNECT": 1}
    assert values("istio_tcp_received_bytes") == {"-": 11}
    assert values("istio_tcp_sent_bytes") == {"-": 22}


def test_connections_of_one_kind_share_their_counters() -> None:
    metrics = Metrics()
    assert outbound(metrics) is outbound(metrics)
    again = hbone("client-0", workload_name="client", canonical_name="cl", canonical_revision="v1")
    assert metrics.connection("source", again, again.identity, TARGET, WEB, None, "mutual_tls") is not outbound(metrics)


def test_unknown_destination_of_plaintext_is_unknown_without_locality() -> None:
    metrics = Metrics()
    labels = metrics.connection("destination", None, None, None, None).label_dict(ResponseFlag.DENY)
    assert labels["reporter"] == "destination"
    assert labels["response_flags"] == "DENY"
    assert "source_region" not in labels
    others = {
        key: value for key, value in labels.items() if key not in {"reporter", "request_protocol", "response_flags"}
    }
    assert set(others.values()) == {"unknown"}


def test_destination_principal_is_the_workloads_even_for_plaintext() -> None:
    plain = tcp("db", "10.2.0.1")
    labels = Metrics().connection("source", SOURCE, None, plain, None).label_dict(ResponseFlag.NONE)
    assert labels["source_principal"] == "unknown"
    assert labels["destination_principal"] == "spiffe://cluster.local/ns/default/sa/db"


def test_help_says_unstable_exactly_where_it_is() -> None:
    metrics = Metrics("1.2")
    outbound(metrics).closed(ResponseFlag.DENY)
    metrics.socket_opened("source")
    metrics.xds_message("type", 5)
    metrics.xds_terminated("Complete")
    metrics.on_demand_dns(SOURCE, "web.example")
    metrics.policy_closed()
    metrics.add_gauge("ztunnel_tunnels", "Tunnels that are open", lambda: 3)
    lines = page(metrics).splitlines()
    helps = {line.split()[2]: line for line in lines if line.startswith("# HELP")}
    assert set(helps) >= STABLE
    for name, line in helps.items():
        assert ("unstable" in line) is (name not in STABLE)
        assert line.endswith(".")
    assert 'istio_build{component="ztunnel",tag="1.2"} 1' in lines
    assert "ztunnel_tunnels 3" in lines
    assert lines[-1] == "# EOF"


def test_family_without_a_sample_is_left_out() -> None:
    assert "istio_tcp_connections" not in page(Metrics())
    assert "istio_xds" not in page(Metrics())


def test_sockets_go_up_and_down() -> None:
    metrics = Metrics()
    metrics.socket_opened("source")
    metrics.socket_opened("destination")
    metrics.socket_closed("source")
    assert 'istio_tcp_sockets_open{reporter="source"} 0' in page(metrics)
    assert 'istio_tcp_sockets_open{reporter="destination"} 1' in page(metrics)


@pytest.mark.parametrize(
    ("accept", "open_metrics"),
    [
        ("", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("text/html, Application/OpenMetrics-Text;version=1.0.0;q=0.5", True),
        (["text/html", "application/openmetrics-text"], True),
        ("application/openmetrics-textual", False),
    ],
)
def test_content_type_is_negotiated(accept: str | list[str], open_metrics: bool) -> None:
    content_type, body = Metrics().exposition(accept)
    expected = (
        "application/openmetrics-text;charset=utf-8;version=1.0.0" if open_metrics else "text/plain; charset=utf-8"
    )
    assert content_type == expected
    assert body.endswith(b"# EOF\n")


def test_label_values_are_escaped() -> None:
    metrics = Metrics()
    metrics.xds_message('a"b\\c\nd', 1)
    assert 'url="a\\"b\\\\c\\nd"' in page(metrics)


def test_label_sets_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SERIES", 5)
    metrics = Metrics()
    for number in range(50):
        peer = SpiffeId.istio("cluster.local", "shop", f"sa-{number}")
        metrics.connection("destination", None, peer, TARGET, None).opened()
    families = families_of(metrics)
    opened = families["istio_tcp_connections_opened"].samples
    assert len(opened) == 6
    assert sum(sample.value for sample in opened) == 50
    assert families["ztunnel_label_sets_merged"].samples[0].value == 45


class Turns(trio.abc.Instrument):
    """Counts the samples that are made between two turns of the loop."""

    def __init__(self) -> None:
        self.made = self.most = 0

    def before_task_step(self, _: trio.lowlevel.Task) -> None:
        self.most = max(self.most, self.made)
        self.made = 0


async def test_a_scrape_of_many_series_leaves_turns_to_the_data_path(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    for number in range(500):
        peer = SpiffeId.istio("cluster.local", "shop", f"sa-{number}")
        metrics.connection("destination", None, peer, TARGET, None).closed(ResponseFlag.CONNECT)
    turns = Turns()

    def counted(labels: Labels, flag: ResponseFlag) -> dict[str, str]:
        turns.made += 1
        return by_name(labels, flag)

    monkeypatch.setattr(module, "by_name", counted)
    trio.lowlevel.add_instrument(turns)
    try:
        body = await collect_pieces(lines(metrics.families()))
    finally:
        trio.lowlevel.remove_instrument(turns)
    assert 0 < turns.most <= ENTRIES
    assert body == metrics.exposition()[1]


def test_it_registers_with_prometheus_client() -> None:
    registry = CollectorRegistry()
    metrics = Metrics()
    registry.register(metrics)
    metrics.socket_opened("source")
    assert registry.get_sample_value("istio_tcp_sockets_open", {"reporter": "source"}) == 1
