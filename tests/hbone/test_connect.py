"""CONNECT requests: what is accepted has one meaning, and everything else is 400."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hbone.connect import (
    MAX_BAGGAGE,
    Authority,
    AuthorityError,
    BadConnect,
    Baggage,
    ConnectRequest,
    new_traceparent,
    response_headers,
)

CONNECT = (b":method", b"CONNECT")

GOOD_AUTHORITIES = [
    ("10.0.0.7:8080", "10.0.0.7", 8080),
    ("0.0.0.0:1", "0.0.0.0", 1),
    ("255.255.255.255:65535", "255.255.255.255", 65535),
    ("[fd00::7]:8080", "fd00::7", 8080),
    ("[::]:80", "::", 80),
    ("[::1]:80", "::1", 80),
    ("[2001:db8:0:0:0:0:0:1]:80", "2001:db8::1", 80),
    ("orders.shop.svc.cluster.local:80", "orders.shop.svc.cluster.local", 80),
    ("localhost:80", "localhost", 80),
    ("a:1", "a", 1),
    ("1a.b-c.2d:80", "1a.b-c.2d", 80),
    ("xn--bcher-kva.example:443", "xn--bcher-kva.example", 443),
    ("a" * 63 + ".example:443", "a" * 63 + ".example", 443),
    (".".join(["a" * 49] * 5) + ".xyz:65535", ".".join(["a" * 49] * 5) + ".xyz", 65535),
]


@pytest.mark.parametrize(("text", "host", "port"), GOOD_AUTHORITIES, ids=lambda v: str(v)[:40])
def test_a_well_formed_authority_is_read(text: str, host: str, port: int) -> None:
    authority = Authority.parse(text)
    assert (authority.host, authority.port) == (host, port)
    assert Authority.parse(text.encode()) == authority
    assert Authority.parse(str(authority)) == authority
    assert ConnectRequest.from_headers((CONNECT, (b":authority", text.encode()))).authority == authority


def test_an_authority_knows_its_address() -> None:
    assert Authority.parse("10.0.0.7:80").ip == ipaddress.IPv4Address("10.0.0.7")
    assert Authority.parse("[fd00::7]:80").ip == ipaddress.IPv6Address("fd00::7")
    assert Authority.parse("orders:80").ip is None
    assert str(Authority("fd00:0::7", 80)) == "[fd00::7]:80"


def test_an_authority_is_checked_however_it_is_made() -> None:
    for host, port in (("A", 80), ("a b", 80), ("", 80), ("[::1]", 80), ("::ffff:1.2.3.4", 80), ("a", 0), ("a", 65536)):
        with pytest.raises(AuthorityError):
            Authority(host, port)
    with pytest.raises(AuthorityError, match="not that of"):
        Authority("10.0.0.7", 80, ipaddress.IPv4Address("10.0.0.8"))


BAD_AUTHORITIES = [
    b"",
    b":",
    b":80",
    b"10.0.0.7",
    b"10.0.0.7:",
    b"10.0.0.7:0",
    b"10.0.0.7:00080",
    b"10.0.0.7:080",
    b"10.0.0.7:65536",
    b"10.0.0.7:99999",
    b"10.0.0.7:100000",
    b"10.0.0.7:4294967376",
    b"10.0.0.7:-80",
    b"10.0.0.7:+80",
    b"10.0.0.7:8_0",
    b"10.0.0.7:0x50",
    b"10.0.0.7:http",
    b"10.0.0.7:80 ",
    b" 10.0.0.7:80",
    b"10.0.0.7 :80",
    b"10.0.0.7: 80",
    b"10.0.0.7\t:80",
    b"10.0.0.7:80\t",
    b"10.0.0.7:80\n",
    b"10.0.0.7:80\r\n",
    b"10.0.0.7:80\x00",
    b"10.0.0.7\x00:80",
    b"10.0.0.7:80:80",
    b"10.0.0.7::80",
    b"10.0.0.7:80,10.0.0.8:80",
    b"10.0.0.7,10.0.0.8:80",
    b"10.0.0.7:80;10.0.0.8:80",
    b"10.0.0.7:80/",
    b"10.0.0.7:80/path",
    b"10.0.0.7:80?query",
    b"10.0.0.7:80#fragment",
    b"10.0.0.7/24:80",
    b"http://10.0.0.7:80",
    b"//10.0.0.7:80",
    b"user@10.0.0.7:80",
    b"user:password@10.0.0.7:80",
    b"@10.0.0.7:80",
    b"10.0.0:80",
    b"10.7:80",
    b"10.0.0.7.8:80",
    b"10.0.0.256:80",
    b"10.0.0.007:80",
    b"010.0.0.7:80",
    b"0177.0.0.1:80",
    b"0x7f.0.0.1:80",
    b"0x7f000001:80",
    b"0x7f.1:80",
    b"2130706433:80",
    b"127.1:80",
    b"10..0.7:80",
    b".10.0.0.7:80",
    b"10.0.0.7.:80",
    b"::1:80",
    b"fd00::7:80",
    b"[fd00::7]",
    b"[fd00::7]:",
    b"[fd00::7]80",
    b"[fd00::7:80",
    b"fd00::7]:80",
    b"[[fd00::7]]:80",
    b"[]:80",
    b"[10.0.0.7]:80",
    b"[orders]:80",
    b"[fe80::1%eth0]:80",
    b"[fe80::1%25eth0]:80",
    b"[::ffff:10.0.0.7]:80",
    b"[::ffff:a00:7]:80",
    b"[0:0:0:0:0:ffff:a00:7]:80",
    b"[::10.0.0.7]:80",
    b"[fd00:::7]:80",
    b"[fd00::7::]:80",
    b"[1:2:3:4:5:6:7]:80",
    b"[1:2:3:4:5:6:7:8:9]:80",
    b"[fd00::12345]:80",
    b"[fd00::g]:80",
    b"[v1.x]:80",
    b"[ ::1]:80",
    b"Orders.shop:80",
    b"ORDERS:80",
    b"orders.shop.:80",
    b".orders.shop:80",
    b"orders..shop:80",
    b"-orders.shop:80",
    b"orders-.shop:80",
    b"orders_1.shop:80",
    b"*.shop:80",
    b"orders%2eshop:80",
    b"orders%00.shop:80",
    b"ord\xc3\xa9rs.shop:80",
    b"\xff\xfe:80",
    b"orders.shop:\xd9\xa8\xd9\xa0",
    b"orders\\shop:80",
    b"orders shop:80",
    b"a" * 64 + b".shop:80",
    b"a" * 250 + b":80",
    b".".join([b"a" * 49] * 6) + b":80",
    b"a" * 100_000,
    b"10.0.0.7:" + b"8" * 100_000,
]


@pytest.mark.parametrize("value", BAD_AUTHORITIES, ids=lambda v: ascii(v[:40]))
def test_a_malformed_authority_is_400(value: bytes) -> None:
    with pytest.raises(BadConnect) as caught:
        ConnectRequest.from_headers((CONNECT, (b":authority", value)))
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_digits_of_other_scripts_are_no_port() -> None:
    with pytest.raises(AuthorityError):
        Authority.parse("orders.shop:٨٠")


HOST = (b":authority", b"10.0.0.7:80")

BAD_REQUESTS = {
    "empty": (),
    "no method": (HOST,),
    "no authority": (CONNECT,),
    "Host instead of authority": (CONNECT, (b"host", b"10.0.0.7:80")),
    "two methods": (CONNECT, CONNECT, HOST),
    "two authorities": (CONNECT, HOST, HOST),
    "two different authorities": (CONNECT, HOST, (b":authority", b"10.0.0.8:80")),
    "GET": ((b":method", b"GET"), HOST),
    "lower case": ((b":method", b"connect"), HOST),
    "CONNECT with a space": ((b":method", b"CONNECT "), HOST),
    "no name of a method": ((b":method", b""), HOST),
    "scheme": (CONNECT, HOST, (b":scheme", b"https")),
    "path": (CONNECT, HOST, (b":path", b"/")),
    "empty path": (CONNECT, HOST, (b":path", b"")),
    "protocol": (CONNECT, HOST, (b":protocol", b"websocket")),
    "extended": (CONNECT, (b":protocol", b"connect-udp"), (b":scheme", b"https"), (b":path", b"/"), HOST),
    "status": (CONNECT, HOST, (b":status", b"200")),
    "an unknown pseudo-header": (CONNECT, HOST, (b":x", b"1")),
    "a bare colon": (CONNECT, HOST, (b":", b"1")),
    "a pseudo-header in upper case": (CONNECT, (b":Authority", b"10.0.0.7:80")),
    "a pseudo-header after a field": (CONNECT, (b"x-a", b"1"), HOST),
    "another Host": (CONNECT, HOST, (b"host", b"10.0.0.8:80")),
    "a Host without port": (CONNECT, HOST, (b"host", b"10.0.0.7")),
    "two Hosts": (CONNECT, HOST, (b"host", b"10.0.0.7:80"), (b"host", b"10.0.0.7:80")),
    "content-length": (CONNECT, HOST, (b"content-length", b"5")),
    "content-length 0": (CONNECT, HOST, (b"content-length", b"0")),
    "transfer-encoding": (CONNECT, HOST, (b"transfer-encoding", b"chunked")),
    "te": (CONNECT, HOST, (b"te", b"trailers")),
    "connection": (CONNECT, HOST, (b"connection", b"close")),
    "keep-alive": (CONNECT, HOST, (b"keep-alive", b"1")),
    "proxy-connection": (CONNECT, HOST, (b"proxy-connection", b"keep-alive")),
    "upgrade": (CONNECT, HOST, (b"upgrade", b"h2c")),
    "a name in upper case": (CONNECT, HOST, (b"X-A", b"1")),
    "an empty name": (CONNECT, HOST, (b"", b"1")),
    "a name with a space": (CONNECT, HOST, (b"x a", b"1")),
    "a name with a colon": (CONNECT, HOST, (b"x:a", b"1")),
    "a name beyond ASCII": (CONNECT, HOST, (b"x\xc3\xa9", b"1")),
    "a value with LF": (CONNECT, HOST, (b"x-a", b"1\nhost: b")),
    "a value with CR": (CONNECT, HOST, (b"x-a", b"1\rb")),
    "a value with NUL": (CONNECT, HOST, (b"x-a", b"1\x00")),
    "a value that begins with a space": (CONNECT, HOST, (b"x-a", b" 1")),
    "a value that ends in a tab": (CONNECT, HOST, (b"x-a", b"1\t")),
    "baggage with LF": (CONNECT, HOST, (b"baggage", b"service.name=a\nb")),
}


@pytest.mark.parametrize("headers", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_malformed_request_is_400(headers: tuple[tuple[bytes, bytes], ...]) -> None:
    with pytest.raises(BadConnect) as caught:
        ConnectRequest.from_headers(headers)
    assert caught.value.status == 400


def test_a_host_field_that_agrees_is_harmless() -> None:
    assert (
        ConnectRequest.from_headers((CONNECT, HOST, (b"host", b"10.0.0.7:80"), (b"x-other", b"\xff"))).authority.port
        == 80
    )


FIELD = st.tuples(
    st.sampled_from(
        [b":method", b":authority", b"host", b"baggage", b"forwarded", b"traceparent", b"x-forwarded-network"]
    )
    | st.binary(max_size=12),
    st.sampled_from([b"CONNECT", b"10.0.0.7:80", b"[fd00::7]:1", b"a.b:80"]) | st.binary(max_size=80),
)


@given(
    st.lists(FIELD, max_size=8).map(tuple) | st.lists(FIELD, max_size=6).map(lambda fields: (CONNECT, HOST, *fields))
)
def test_headers_raise_nothing_but_bad_connect_and_what_is_read_can_be_sent(
    headers: tuple[tuple[bytes, bytes], ...],
) -> None:
    try:
        request = ConnectRequest.from_headers(headers)
    except BadConnect:
        return
    sent = request.to_headers()
    assert sent[0] == CONNECT
    again = ConnectRequest.from_headers(sent)
    assert again.authority == request.authority
    assert (again.forwarded_for, again.forwarded_host) == (request.forwarded_for, request.forwarded_host)
    assert (again.traceparent, again.network) == (request.traceparent, request.network)
    assert ConnectRequest.from_headers(again.to_headers()) == again


@given(st.text(max_size=60) | st.from_regex(r"[\[\]0-9a-f:.%a-z-]{0,40}:[0-9]{0,6}", fullmatch=True))
@example("[::ffff:0:0]:1")
def test_an_authority_raises_nothing_but_authority_error_and_reads_as_it_writes(text: str) -> None:
    try:
        authority = Authority.parse(text)
    except AuthorityError:
        return
    assert Authority.parse(str(authority)) == authority
    assert text.isascii()
    assert 1 <= authority.port <= 65535
    if authority.ip is None:
        with pytest.raises(ValueError):
            ipaddress.ip_address(authority.host)


# Telemetry

BAGGAGE = Baggage(
    cluster="Kubernetes",
    namespace="shop",
    workload_type="deployment",
    workload_name="web",
    service_name="web",
    service_version="v1",
)
WIRE = (
    b"k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web,service.version=v1"
)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


def test_a_request_is_written_in_ztunnels_order_and_forms() -> None:
    request = ConnectRequest(
        authority=Authority.parse("[fd00::7]:8080"),
        baggage=BAGGAGE,
        forwarded_for="[::1]:80",
        forwarded_host="orders.shop.svc.cluster.local",
        traceparent=TRACE,
        network="",
    )
    assert request.to_headers() == (
        (b":method", b"CONNECT"),
        (b":authority", b"[fd00::7]:8080"),
        (b"baggage", WIRE),
        (b"forwarded", b'for="[::1]:80";host=orders.shop.svc.cluster.local'),
        (b"traceparent", TRACE.encode()),
        (b"x-forwarded-network", b""),
    )
    assert ConnectRequest.from_headers(request.to_headers()) == request


def test_a_bare_request_still_has_baggage() -> None:
    request = ConnectRequest(authority=Authority("10.0.0.7", 80))
    assert request.to_headers() == ((b":method", b"CONNECT"), (b":authority", b"10.0.0.7:80"), (b"baggage", b""))


def test_what_would_read_as_something_else_is_not_sent() -> None:
    request = ConnectRequest(
        authority=Authority("10.0.0.7", 80),
        baggage=Baggage(cluster="a,b=c", namespace="a b", workload_name="é", service_name="x\r\ny", zone="ok"),
        forwarded_for='1.2.3.4:5";host=evil',
        forwarded_host="a;for=b",
        traceparent="00-zz",
        network="é\n",
    )
    assert request.to_headers()[2:] == ((b"baggage", b"cloud.availability_zone=ok"),)


def read(*fields: tuple[bytes, bytes]) -> ConnectRequest:
    return ConnectRequest.from_headers((CONNECT, HOST, *fields))


def test_absent_telemetry_is_none() -> None:
    request = read()
    assert request.baggage is None
    assert request.forwarded_for is None
    assert request.traceparent is None
    assert request.network is None


@pytest.mark.parametrize(
    ("field", "source", "service"),
    [
        (b'for="10.0.0.1:1234"', "10.0.0.1:1234", None),
        (b'for="[::1]:80";host=a.b', "[::1]:80", "a.b"),
        (b'for=10.0.0.1:1;host="a.b"', "10.0.0.1:1", "a.b"),
        (b"host=a.b", None, "a.b"),
        (b" host=a.b ; for=x".strip(), "x", "a.b"),
        (b"host=first;host=second", None, "first"),
        (b"Host=a.b", None, None),
        (b"host=", None, None),
        (b'host=""', None, None),
        (b'host="a;b"', None, None),
        (b'host=a"b', None, None),
        (b"host=a b", None, None),
        (b"nothing", None, None),
        (b"", None, None),
        (b"host=\xc3\xa9", None, None),
        (b"host=" + b"a" * 2000, None, None),
    ],
)
def test_forwarded_is_read_where_it_is_clear(field: bytes, source: str | None, service: str | None) -> None:
    request = read((b"forwarded", field))
    assert (request.forwarded_for, request.forwarded_host) == (source, service)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        TRACE[:-1].encode(),
        TRACE.encode() + b"0",
        TRACE.upper().encode(),
        TRACE.replace("-", "_").encode(),
        TRACE.replace("a", "g").encode(),
        b"\xff" * 55,
    ],
)
def test_a_malformed_traceparent_is_ignored(value: bytes) -> None:
    assert read((b"traceparent", value)).traceparent is None


def test_a_traceparent_is_read() -> None:
    assert read((b"traceparent", TRACE.encode())).traceparent == TRACE


def test_a_new_traceparent_is_well_formed_and_new() -> None:
    first, second = new_traceparent(), new_traceparent()
    assert first != second
    for made in (first, second):
        assert read((b"traceparent", made.encode())).traceparent == made


@pytest.mark.parametrize(
    ("name", "value"),
    [(b"forwarded", b"host=a.b"), (b"traceparent", TRACE.encode()), (b"x-forwarded-network", b"net")],
)
def test_a_repeated_field_that_may_stand_once_is_ignored(name: bytes, value: bytes) -> None:
    assert read((name, value)) != read()
    assert read((name, value), (name, value)) == read()


def test_a_gateway_is_a_request_from_another_network() -> None:
    assert read((b"x-forwarded-network", b"net-1")).is_from_gateway("net-2")
    assert not read((b"x-forwarded-network", b"NET-1")).is_from_gateway("net-1")
    assert not read().is_from_gateway("net-1")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([WIRE], BAGGAGE),
        ([b""], Baggage()),
        ([], Baggage()),
        ([b"service.name=a", b"service.version=v"], Baggage(service_name="a", service_version="v")),
        ([b"service.name=a,service.name=b"], Baggage(service_name="b")),
        ([b"service.name=a", b"service.name="], Baggage()),
        ([b"service.name=a=b=c"], Baggage(service_name="a")),
        ([b"service.name"], Baggage()),
        ([b" service.name=a"], Baggage()),
        ([b"service.name= a"], Baggage(service_name=" a")),
        ([b"k8s.pod.name=p"], Baggage(workload_type="pod", workload_name="p")),
        ([b"k8s.job.name=j"], Baggage(workload_type="job", workload_name="j")),
        ([b"k8s.cronjob.name=c"], Baggage(workload_type="cronjob", workload_name="c")),
        ([b"k8s.pod.name=p,k8s.deployment.name=d"], Baggage(workload_type="deployment", workload_name="d")),
        ([b"k8s.pod.name=p,k8s.pod.name="], Baggage()),
        ([b"k8s.statefulset.name=s,unknown=x,=y,,"], Baggage()),
        ([b"cloud.region=r,cloud.availability_zone=z"], Baggage(region="r", zone="z")),
    ],
)
def test_baggage_is_read_as_ztunnel_reads_it(fields: list[bytes], expected: Baggage) -> None:
    assert Baggage.parse(fields) == expected


@pytest.mark.parametrize(
    "field", [b"service.name=\xc3\xa9", b"service.name=a\x7f", b"service.name=\x01", b"a" * (MAX_BAGGAGE + 1)]
)
def test_baggage_that_is_not_text_is_ignored_whole(field: bytes) -> None:
    assert Baggage.parse([b"service.version=v", field]) is None


@given(
    st.lists(st.binary(max_size=60) | st.from_regex(rb"(service\.name|k8s\.pod\.name|x)=[ -~]{0,9}", fullmatch=True))
)
def test_baggage_raises_nothing_and_what_is_written_reads_the_same(fields: list[bytes]) -> None:
    baggage = Baggage.parse(fields)
    if baggage is not None:
        written = str(baggage).encode("ascii")
        assert str(Baggage.parse([written])) == written.decode()


def test_a_response_carries_the_destinations_baggage() -> None:
    assert response_headers(BAGGAGE) == ((b"baggage", WIRE),)
    assert response_headers(Baggage()) == ((b"baggage", b""),)
    assert response_headers() == ()
