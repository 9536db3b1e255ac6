from __future__ import annotations

import os
import re
from pathlib import Path

import attrs
import pytest

from hbone.errors import ConfigurationError
from ztunnel.config import Config, WorkloadInfo
from ztunnel.dumpconfig import config_dump
from ztunnel.mesh import parse_ip


def read(environ: dict[str, str] | None = None, directory: Path | None = None) -> Config:
    return Config.from_env(environ or {}, directory=directory or Path("/nonexistent"))


def test_empty_environment_gives_the_defaults() -> None:
    assert read() == Config()
    assert read().own_ports == {15001, 15006, 15008, 15000, 15020, 15021, 15053}
    assert (read().listen_host, read().loopback_host) == ("::", "127.0.0.1")


def test_environment_of_a_dedicated_ztunnel_is_read() -> None:
    found = read(
        {
            "PROXY_MODE": "dedicated",
            "PROXY_WORKLOAD_INFO": "shop/web-0/web",
            "NETWORK": "n",
            "NODE_NAME": "node-a",
            "CLUSTER_ID": "one",
            "ISTIO_META_CLUSTER_ID": "two",
            "ISTIO_META_ISTIO_VERSION": "1.30",
            "ISTIO_METAJSON_LABELS": '{"app": "x"}',
            "ISTIO_METAJSON_BAD": "{",
            "XDS_ADDRESS": "istiod.example:15012",
            "CA_ADDRESS": "",
            "XDS_HEADER_X-Api": "v",
            "SECRET_TTL": "1h30m",
            "KEEPALIVE_TIME": "10s",
            "ENABLE_ORIG_SRC": "false",
            "IPV6_ENABLED": "false",
            "UNSTABLE_ENABLE_SOCKS5": "true",
            "ZTUNNEL_BIND_ADDRESS": "127.0.1.1",
            "ZTUNNEL_HBONE_PORT": "25008",
            "ZTUNNEL_STATE_DIR": "/tmp/z",
            "RUST_LOG": "debug,access=info,hickory_server::server=off",
            "LOG_FORMAT": "json",
        }
    )
    assert found.served == WorkloadInfo("shop", "web-0", "web")
    assert (found.network, found.node_name, found.cluster_id) == ("n", "node-a", "two")
    assert (found.istio_version, found.json_metadata) == ("1.30", {"LABELS": {"app": "x"}})
    assert (found.xds_address, found.ca_address) == ("https://istiod.example:15012", "")
    assert found.xds_headers == (("x-api", "v"),)
    assert (found.secret_ttl, found.keepalive_time, found.original_source) == (5400.0, 10.0, False)
    assert (found.bind_address, found.listen_host, found.loopback_host) == (
        parse_ip("127.0.1.1"),
        "127.0.1.1",
        "127.0.1.1",
    )
    assert {25008, 15080} <= found.own_ports
    assert 15008 not in found.own_ports
    assert (found.log_level, found.log_format, found.state_dir) == ("debug,access=info", "json", Path("/tmp/z"))
    assert found.warnings == (
        "RUST_LOG part 'hickory_server::server=off' does nothing here: no log scope has this name",
        "ISTIO_METAJSON_BAD is not JSON and was skipped",
    )


def test_bind_address_that_others_reach_keeps_admin_on_loopback() -> None:
    found = read({"ZTUNNEL_BIND_ADDRESS": "10.0.0.5"})
    assert (found.listen_host, found.loopback_host) == ("10.0.0.5", "127.0.0.1")


@pytest.mark.parametrize(
    ("environ", "hosts", "port"),
    [
        ({}, ["127.0.0.1", "::1"], 15053),
        ({"IPV6_ENABLED": "false"}, ["127.0.0.1"], 15053),
        ({"ZTUNNEL_BIND_ADDRESS": "127.0.1.1"}, ["127.0.1.1"], 15053),
        ({"ZTUNNEL_BIND_ADDRESS": "10.0.0.5"}, ["127.0.0.1"], 15053),
        ({"ISTIO_META_DNS_PROXY_ADDR": "localhost:53"}, ["127.0.0.1", "::1"], 53),
        ({"ISTIO_META_DNS_PROXY_ADDR": "10.0.0.5:53", "ZTUNNEL_DNS_PORT": "54"}, ["10.0.0.5"], 54),
        ({"ISTIO_META_DNS_PROXY_ADDR": "[fd00::1]:53"}, ["fd00::1"], 53),
        ({"PROXY_CONFIG": "proxyMetadata: {ISTIO_META_DNS_PROXY_ADDR: '127.0.0.9:5353'}"}, ["127.0.0.9"], 5353),
    ],
)
def test_dns_proxy_listens_where_it_is_told(environ: dict[str, str], hosts: list[str], port: int) -> None:
    found = read(environ)
    assert found.dns_proxy
    assert ([str(ip) for ip in found.dns_hosts], found.dns_port) == (hosts, port)
    assert port in found.own_ports
    assert found.warnings == ()


@pytest.mark.parametrize(("value", "on"), [("true", True), ("TRUE", True), ("false", False), ("", False), ("1", False)])
def test_dns_proxy_is_on_unless_told_otherwise(value: str, on: bool) -> None:
    found = read({"ISTIO_META_DNS_CAPTURE": value})
    assert found.dns_proxy is on
    assert (15053 in found.own_ports) is on


def test_resolvers_of_the_dns_proxy_are_addresses_with_or_without_a_port() -> None:
    found = read({"ZTUNNEL_DNS_SERVERS": "10.0.0.1, 127.0.0.53:54,fd00::1,[fd00::2]:5353,[fd00::3]"})
    assert config_dump(found)["dnsResolverCfg"] == [
        "10.0.0.1:53",
        "127.0.0.53:54",
        "[fd00::1]:53",
        "[fd00::2]:5353",
        "[fd00::3]:53",
    ]


def test_istiod_in_the_cluster_is_the_default_there() -> None:
    found = read({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert found.xds_address == found.ca_address == "https://istiod.istio-system.svc:15012"


MESH = """
defaultConfig:
  discoveryAddress: file.example:15012
  proxyAdminPort: 15099
  statsPort: 15098
  unknownKey: {}
  proxyMetadata: {ISTIO_META_A: file, B: file, C: file}
"""


def test_mesh_file_then_proxy_config_then_variables(tmp_path: Path) -> None:
    path = tmp_path / "etc/istio/config/mesh"
    path.parent.mkdir(parents=True)
    path.write_text(MESH)
    found = read({}, tmp_path)
    assert (found.xds_address, found.admin_port, found.stats_port) == ("https://file.example:15012", 15099, 15098)
    assert found.proxy_metadata == {"A": "file", "B": "file", "C": "file"}
    found = read(
        {
            "PROXY_CONFIG": '{"statsPort": 1, "proxyMetadata": {"B": "env", "CLUSTER_ID": "c"}}',
            "ISTIO_META_C": "variable",
            "ZTUNNEL_ADMIN_PORT": "2",
        },
        tmp_path,
    )
    assert (found.admin_port, found.stats_port, found.cluster_id) == (2, 1, "c")
    assert found.proxy_metadata == {"A": "file", "B": "env", "C": "variable", "CLUSTER_ID": "c"}
    assert read({"XDS_ADDRESS": "https://x:1"}, tmp_path).xds_address == "https://x:1"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"KEEPALIVE_ENABLED": "TRUE"}, "invalid env var KEEPALIVE_ENABLED=TRUE (expected exactly true or false)"),
        ({"KEEPALIVE_ENABLED": ""}, "invalid env var KEEPALIVE_ENABLED= (expected exactly true or false)"),
        ({"KEEPALIVE_RETRIES": ""}, "invalid env var KEEPALIVE_RETRIES= (expected a decimal number)"),
        ({"KEEPALIVE_RETRIES": "0x9"}, "invalid env var KEEPALIVE_RETRIES=0x9 (expected a decimal number)"),
        ({"KEEPALIVE_RETRIES": "0"}, "keepalive_retries is 0; it must be from 1 to 127"),
        ({"SECRET_TTL": "5"}, "invalid env var SECRET_TTL=5 ('5' is not a duration"),
        ({"SECRET_TTL": "91d"}, "invalid env var SECRET_TTL=91d (secret_ttl is 7862400"),
        ({"HTTP2_FRAME_SIZE": "1"}, "invalid env var HTTP2_FRAME_SIZE=1 (frame_size is 1; it must be from 16384"),
        ({"PROXY_MODE": "shared"}, "PROXY_MODE=shared (shared mode is not built yet"),
        ({"PROXY_MODE": ""}, "invalid env var PROXY_MODE= (expected dedicated)"),
        ({"PROXY_WORKLOAD_INFO": "a/b"}, "(expected namespace/name/service-account)"),
        ({"PROXY_WORKLOAD_INFO": "a//b"}, "(expected namespace/name/service-account)"),
        ({"XDS_ADDRESS": "http://a:1"}, "(only https is possible"),
        ({"XDS_ADDRESS": "https://a:1/path"}, "(expected https://host:port and nothing else)"),
        ({"CA_ADDRESS": "h:99999"}, "invalid env var CA_ADDRESS=h:99999"),
        ({"ZTUNNEL_BIND_ADDRESS": "localhost"}, "(expected an IP address)"),
        ({"ZTUNNEL_HBONE_PORT": "65536"}, "(a port is at most 65535)"),
        ({"ZTUNNEL_STATE_DIR": ""}, "(expected a path)"),
        ({"LOG_FORMAT": "xml"}, "(expected plain or json or console)"),
        (
            {"RUST_LOG": "loud"},
            "(log level is 'loud'; it must be one of trace, debug, info, warn, warning, error, off)",
        ),
        ({"TERMINATION_GRACE_PERIOD_SECONDS": "x"}, "invalid env var TERMINATION_GRACE_PERIOD_SECONDS=x"),
        ({"TLS12_ENABLED": "true"}, "(only TLS 1.3 is spoken; unset it)"),
        ({"COMPLIANCE_POLICY": "pqc"}, "invalid env var COMPLIANCE_POLICY=pqc"),
        ({"FAKE_CA": "true"}, "(there is no fake CA"),
        ({"LOCAL_XDS": "", "LOCAL_XDS_PATH": "/x"}, "LOCAL_XDS and LOCAL_XDS_PATH are both set; keep one of them"),
        ({"ENABLE_PROXY": "false"}, "ztunnel run without any servers enabled"),
        ({"PROXY_CONFIG": "["}, "PROXY_CONFIG is not YAML, line 1"),
        ({"PROXY_CONFIG": "[]"}, "PROXY_CONFIG is a list; expected keys and values"),
        ({"PROXY_CONFIG": "statsPort: x"}, "PROXY_CONFIG: statsPort is 'x'; expected a port"),
        ({"PROXY_CONFIG": "concurrency: many"}, "PROXY_CONFIG: concurrency is 'many'; expected a number of workers"),
        ({"PROXY_CONFIG": "concurrency: -1"}, "concurrency is -1"),
        ({"PROXY_CONFIG": "concurrency: 257"}, "workers up to 256"),
        ({"PROXY_CONFIG": "concurrency: true"}, "concurrency is True"),
        ({"PROXY_CONFIG": "proxyMetadata: {A: 1}"}, "quote numbers and booleans"),
        ({"PROXY_CONFIG": "discoveryAddress: http://x"}, "discoveryAddress is 'http://x' (only https"),
        ({"ISTIO_META_DNS_PROXY_ADDR": "nonsense"}, "failed to parse DNS_PROXY_ADDR: 'nonsense'"),
        ({"ISTIO_META_DNS_PROXY_ADDR": "example:53"}, "failed to parse DNS_PROXY_ADDR: 'example:53'"),
        ({"ISTIO_META_DNS_PROXY_ADDR": "127.0.0.1"}, "failed to parse DNS_PROXY_ADDR: '127.0.0.1'"),
        ({"ZTUNNEL_DNS_SERVERS": "dns.example"}, "ZTUNNEL_DNS_SERVERS=dns.example (expected an IP address)"),
        ({"ZTUNNEL_DNS_SERVERS": "10.0.0.1:65536"}, "(a port is at most 65535)"),
        ({"XDS_HEADER_a b": "v"}, "the name is no header name"),
        ({"CA_HEADER_a": "v\n"}, "the value is not printable ASCII"),
    ],
)
def test_wrong_variable_is_one_sentence(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(environ)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environ", [{"CRL_PATH": ""}, {"TLS12_ENABLED": "yes"}, {"COMPLIANCE_POLICY": ""}, {"FAKE_CA": "false"}]
)
def test_switch_that_is_off_is_not_refused(environ: dict[str, str]) -> None:
    assert read(environ) == Config()


@pytest.mark.parametrize(
    "environ",
    [
        {"ZTUNNEL_RESOURCE_CPU_REQUEST": "2"},
        {"INPOD_UDS": "/x"},
    ],
)
def test_variable_without_effect_is_told(environ: dict[str, str]) -> None:
    (warning,) = read(environ).warnings
    (name,) = environ
    assert name in warning
    assert "does nothing here" in warning


def test_on_demand_is_refused_beside_the_dns_proxy() -> None:
    with pytest.raises(ConfigurationError, match="set ISTIO_META_DNS_CAPTURE=false"):
        read({"XDS_ON_DEMAND": "true"})
    assert read({"XDS_ON_DEMAND": "true", "ISTIO_META_DNS_CAPTURE": "false"}).on_demand
    assert not read({"XDS_ON_DEMAND": "yes"}).on_demand


@pytest.mark.parametrize(("seconds", "deadline"), [("30", 25.0), ("11", 6.0), ("10", 9.0), ("1", 1.0), ("0", 1.0)])
def test_grace_period_gives_the_drain_deadline_unless_it_is_set(seconds: str, deadline: float) -> None:
    assert read({"TERMINATION_GRACE_PERIOD_SECONDS": seconds}).drain_deadline == deadline
    both = {"TERMINATION_GRACE_PERIOD_SECONDS": seconds, "CONNECTION_TERMINATION_DEADLINE": "7s"}
    assert read(both).drain_deadline == 7.0


def test_token_and_headers_appear_in_no_dump_or_error() -> None:
    found = read({"AUTH_TOKEN": "hunter2", "XDS_HEADER_A": "hunter2", "CA_HEADER_A": "hunter2"})
    assert found.auth_token == "hunter2"
    assert "hunter2" not in repr(found) + str(config_dump(found))
    with pytest.raises(ConfigurationError) as caught:
        read({"CA_HEADER_A": "hunter2\n"})
    assert "hunter2" not in str(caught.value)


def test_missing_workload_is_told_when_it_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="PROXY_WORKLOAD_INFO is not set"):
        _ = read().served


def test_every_variable_is_documented_once() -> None:
    variables = Config.variables()
    names = [variable.name for variable in variables]
    assert len(set(names)) == len(names)
    assert all(variable.meaning and variable.default for variable in variables)
    assert all(re.fullmatch(r"[A-Z0-9_]+(<\w+>)?", name) for name in names)


def test_every_field_can_be_set_or_says_where_it_comes_from() -> None:
    derived = {"dns_proxy", "dns_address", "xds_headers", "ca_headers", "proxy_metadata", "json_metadata", "warnings"}
    assert {field.name for field in attrs.fields(Config) if "env" not in field.metadata} == derived


def test_connection_parameters_follow() -> None:
    found = read({"HTTP2_STREAM_WINDOW_SIZE": "131072", "HTTP2_FRAME_SIZE": "16384"}).connection
    assert (found.stream_window, found.initial_stream_window, found.max_frame_size) == (131072, 131072, 16384)


@pytest.mark.parametrize(
    ("environ", "workers"),
    [
        ({}, 1),
        ({"ZTUNNEL_CPU_LIMIT": "8"}, 1),
        ({"ZTUNNEL_WORKER_THREADS": "4"}, 4),
        ({"ZTUNNEL_WORKER_THREADS": "1"}, 1),
        ({"ZTUNNEL_WORKER_THREADS": "0", "ZTUNNEL_CPU_LIMIT": "8"}, 8),
        ({"ZTUNNEL_WORKER_THREADS": "0"}, len(os.sched_getaffinity(0))),
        ({"ZTUNNEL_WORKER_THREADS": "30%", "ZTUNNEL_CPU_LIMIT": "16"}, 5),
        ({"ZTUNNEL_WORKER_THREADS": "10%", "ZTUNNEL_CPU_LIMIT": "4"}, 1),
        ({"ZTUNNEL_WORKER_THREADS": "0", "ZTUNNEL_CPU_LIMIT": "8", "ZTUNNEL_RESOURCE_CPU_LIMIT": "2500m"}, 3),
        ({"ZTUNNEL_WORKER_THREADS": "100%", "ZTUNNEL_RESOURCE_CPU_LIMIT": "1.5"}, 2),
        ({"ZTUNNEL_WORKER_THREADS": "0", "ZTUNNEL_RESOURCE_CPU_LIMIT": "500m"}, 1),
        ({"PROXY_CONFIG": "concurrency: 3"}, 3),
        ({"PROXY_CONFIG": "concurrency: 0", "ZTUNNEL_CPU_LIMIT": "8"}, 8),
        ({"PROXY_CONFIG": "concurrency: null"}, 1),
        ({"PROXY_CONFIG": "concurrency: 3", "ZTUNNEL_WORKER_THREADS": "2"}, 2),
    ],
)
def test_workers_are_a_number_all_cores_or_a_share_of_them(environ: dict[str, str], workers: int) -> None:
    assert read(environ).workers == workers


@pytest.mark.parametrize(
    "environ",
    [
        {"ZTUNNEL_WORKER_THREADS": value}
        for value in ("-1", "0%", "101%", "%", "four", "1.5", "257", "", "9999999999999999999%")
    ]
    + [{"ZTUNNEL_RESOURCE_CPU_LIMIT": value} for value in ("0", "0m", "1e3", "1k", "-1", "m", "999")]
    + [{"ZTUNNEL_CPU_LIMIT": value} for value in ("0", "2m", "257")],
)
def test_workers_that_cannot_be_counted_are_refused(environ: dict[str, str]) -> None:
    ((name, value),) = environ.items()
    with pytest.raises(ConfigurationError, match=f"{name}={re.escape(value)}"):
        read(environ)
