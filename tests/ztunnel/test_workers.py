"""Workers: what is said between them and their parent, and what becomes of them, without a mesh around."""

from __future__ import annotations

import collections
import json
import os
import pickle
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tests.support.daemon import Running, policy, running, settings, workload
from tests.support.sizes import size
from tests.support.standing import printed

from hbone.errors import ConfigurationError
from hbone.testing.ca import TestCa
from ztunnel.config import Config
from ztunnel.control.svids import NoCertificate
from ztunnel.dataplane import SocketCalls
from ztunnel.dataplane.listener import open_listeners
from ztunnel.errors import ResponseFlag
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE, parse_ip
from ztunnel.metrics import Counts, Traffic
from ztunnel.workers import supervisor
from ztunnel.workers.book import Page, WorkerMetrics, make_memory
from ztunnel.workers.wire import Decoder, Kind, Message, WireError, pack_identity, unpack_identity
from ztunnel.workers.worker import ReceivedIdentity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CA = TestCa()

messages = st.builds(Message, st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=300))


# what is said


@given(st.lists(messages, max_size=8), st.lists(st.integers(1, 64), min_size=1, max_size=64))
def test_any_chunking_gives_the_same_messages(sent: list[Message], sizes: list[int]) -> None:
    data = b"".join(message.encode() for message in sent)
    decoder, found, at, turn = Decoder(300), [], 0, 0
    while at < len(data):
        step = sizes[turn % len(sizes)]
        found += decoder.receive_data(data[at : at + step])
        at, turn = at + step, turn + 1
    assert found == sent


@given(st.binary(max_size=200))
def test_garbage_is_messages_or_a_wire_error(data: bytes) -> None:
    try:
        for message in Decoder(64).receive_data(data):
            assert len(message.body) <= 64
    except WireError:
        pass


def test_a_message_over_the_limit_is_refused_before_it_came() -> None:
    data = Message(Kind.REPORTED, 1, bytes(65)).encode()
    with pytest.raises(WireError, match="65 bytes; at most 64"):
        Decoder(64).receive_data(data[:9])


def test_an_identity_arrives_as_it_was() -> None:
    sent = CA.identity("shop", "web")
    got = unpack_identity(pack_identity(sent))
    assert got is not None
    assert got.svid.id == sent.svid.id
    assert got.svid.to_pem() == sent.svid.to_pem()
    assert {name: bundle.to_pem() for name, bundle in got.bundles.items()} == {
        name: bundle.to_pem() for name, bundle in sent.bundles.items()
    }
    assert unpack_identity(pack_identity(None)) is None


PACKED = pack_identity(CA.identity("shop", "web"))


@given(st.integers(1, 10**6))
def test_a_cut_identity_is_no_identity(cut: int) -> None:
    with pytest.raises((WireError, ValueError)):
        unpack_identity(PACKED[: -(1 + cut % (len(PACKED) - 1))])


# the certificate


async def test_a_worker_without_a_certificate_asks_and_is_told_why_there_is_none() -> None:
    asked: list[int] = []
    source = ReceivedIdentity(lambda: asked.append(1))
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(NoCertificate, match="the CA is away"):
                await source.fetch()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        source.refused("the CA is away")
    assert asked == [1]


async def test_a_worker_drops_the_certificate_of_another_identity() -> None:
    source = ReceivedIdentity(lambda: None)
    identity = CA.identity("shop", "web")
    source.received(pack_identity(identity))
    assert (await source.fetch()).svid.id == identity.svid.id
    source.want(identity.svid.id)
    assert source.current() is not None
    source.want(CA.identity("shop", "other").svid.id)
    assert source.current() is None


def test_a_worker_stops_using_a_certificate_when_it_expires() -> None:
    identity = CA.identity("shop", "web")
    now = [identity.svid.not_before.timestamp()]
    source = ReceivedIdentity(lambda: None, lambda: now[0])
    source.received(pack_identity(identity))
    assert source.current() is not None
    now[0] = identity.svid.expires_at.timestamp()
    assert source.current() is None


# what is counted


@pytest.fixture
def page_and_metrics() -> Iterator[tuple[Page, WorkerMetrics]]:
    fd = make_memory()
    page = Page(fd)
    yield page, WorkerMetrics(fd, page.announced)
    page.close()


def test_counters_are_in_the_parents_hands_at_once(page_and_metrics: tuple[Page, WorkerMetrics]) -> None:
    page, metrics = page_and_metrics
    traffic = metrics.connection("source", None, None, None, None)
    metrics.socket_opened("source")
    traffic.opened()
    traffic.opened()
    traffic.received(7)
    traffic.sent(9)
    traffic.closed(ResponseFlag.DENY)
    metrics.policy_closed()
    counts = page.counts()
    (found,) = counts.traffic.values()
    assert found.labels == traffic.labels
    assert (found.opened_count, found.received_bytes, found.sent_bytes) == (2, 7, 9)
    assert found.closed_by_flag == found.failed_by_flag == {ResponseFlag.DENY: 1}
    assert counts.sockets == {"source": 1, "destination": 0}
    assert counts.policy_closed == 0 or counts.policy_closed == 1
    assert page.counts().policy_closed == 1


def test_bytes_of_live_connections_are_seen_after_the_accounts_were_brought_up_to_date(
    page_and_metrics: tuple[Page, WorkerMetrics],
) -> None:
    page, metrics = page_and_metrics
    traffic = metrics.connection("source", None, None, None, None)
    traffic.opened()
    traffic.received(5)
    metrics.write()
    (found,) = page.counts().traffic.values()
    assert found.received_bytes == 5


def test_connections_that_ended_with_their_worker_count_as_failed(
    page_and_metrics: tuple[Page, WorkerMetrics],
) -> None:
    page, metrics = page_and_metrics
    traffic = metrics.connection("source", None, None, None, None)
    metrics.socket_opened("source")
    for _ in range(3):
        traffic.opened()
    traffic.closed()
    counts, lost = page.last_counts()
    (found,) = counts.traffic.values()
    assert lost == 2
    assert found.closed_by_flag == {ResponseFlag.NONE: 1, ResponseFlag.CONNECT: 2}
    assert found.failed_by_flag == {ResponseFlag.CONNECT: 2}
    assert counts.sockets == {}  # nothing of it is open


def test_a_host_name_has_a_row_of_its_own(page_and_metrics: tuple[Page, WorkerMetrics]) -> None:
    page, metrics = page_and_metrics
    for name in ("a.example", "b.example", "a.example"):
        metrics.name_resolved((("web",), name))
    assert page.counts().on_demand == {(("web",), "a.example"): 2, (("web",), "b.example"): 1}


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"row": 0, "name": [[], "x"]}', b'{"row": 99999999, "name": [[], "x"]}']
)
def test_a_row_that_there_is_not_is_refused(body: bytes, page_and_metrics: tuple[Page, WorkerMetrics]) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)):
        page_and_metrics[0].announced(body)


labels = st.tuples(
    st.sampled_from(["source", "destination"]),
    st.tuples(st.sampled_from("ab")),
    st.tuples(st.sampled_from("cd")),
    st.just("unknown"),
    st.just(()),
)


@given(st.lists(st.lists(st.tuples(labels, st.sampled_from(ResponseFlag), st.integers(0, 99)), max_size=9), max_size=4))
def test_the_sum_of_all_is_what_each_counted(workers: list[list[tuple[Any, ResponseFlag, int]]]) -> None:
    total = Counts()
    expected: collections.Counter[Any] = collections.Counter()
    for connections in workers:
        counts = Counts()
        for key, flag, nbytes in connections:
            traffic = counts.traffic.setdefault(key, Traffic(key))
            traffic.opened()
            traffic.sent(nbytes)
            traffic.closed(flag)
            expected[key] += 1
            expected[key, flag] += 1
            expected[key, "bytes"] += nbytes
        total.add(counts)
    for key, traffic in total.traffic.items():
        assert traffic.opened_count == expected[key]
        assert traffic.sent_bytes == expected[key, "bytes"]
        assert traffic.closed_by_flag == {flag: n for flag in ResponseFlag if (n := expected[key, flag])}


# the listeners


def own_settings(**more: Any) -> Config:
    ports: dict[str, Any] = {"hbone_port": 0, "inbound_port": 0, "outbound_port": 0}
    return Config(bind_address=parse_ip("127.0.0.1"), original_source=False, **{**ports, **more})


@pytest.mark.parametrize(
    ("shares", "count"),
    [(2, 1000), (4, 1000), (8, 4000)],  # the kernel's hash is chance: a quarter is 4.5 standard deviations or more
)
def test_connections_of_one_client_spread_evenly(shares: int, count: int) -> None:
    found = open_listeners(SocketCalls(), own_settings(), shares).shares
    address = found[0]["outbound"].getsockname()
    assert {share["outbound"].getsockname() for share in found} == {address}
    accepted = [0] * shares
    for _ in range(count):
        with socket.create_connection(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            for number, share in enumerate(found):
                try:
                    taken, _peer = share["outbound"]._accept()  # type: ignore[attr-defined]
                except BlockingIOError:
                    continue
                os.close(taken)
                accepted[number] += 1
    for share in found:
        for sock in share.values():
            sock.close()
    assert sum(accepted) == count
    assert all(abs(n - count / shares) <= count / shares / 4 for n in accepted), accepted


def test_an_address_that_another_has_is_not_shared_with_it() -> None:
    found = open_listeners(SocketCalls(), own_settings(), 2).shares
    for what in ("hbone", "outbound"):
        port = found[0][what].getsockname()[1]
        for shares in (1, 2):
            with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port} .*another program has it"):
                open_listeners(SocketCalls(), own_settings(**{f"{what}_port": port}), shares)
    for share in found:
        for sock in share.values():
            sock.close()


# the processes


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Running]:
    config = settings(ZTUNNEL_WORKER_THREADS="2", AUTH_TOKEN="secret", UNSTABLE_ENABLE_SOCKS5="true")
    with trio.fail_after(60):
        async with running(config, state=tmp_path / "state") as ztunnel:
            yield ztunnel


async def pids(ztunnel: Running) -> list[int]:
    return [worker["pid"] for worker in (await ztunnel.status())["workers"]]


async def until(ztunnel: Running, **wanted: Any) -> None:
    """Wait until every worker is so."""
    while not all(
        worker[name] == value for worker in (await ztunnel.status())["workers"] for name, value in wanted.items()
    ):
        await trio.sleep(0.02)


async def test_every_worker_knows_the_mesh_and_the_certificate_before_it_is_ready(two: Running) -> None:
    await two.sync(policies=(policy("p"),))
    await two.until_ready()
    status = await two.status()
    assert [worker["state"] for worker in status["workers"]] == ["serving", "serving"]
    assert status["connections"] == {"inbound": 0, "outbound": 0}
    assert len(set(await pids(two))) == 2
    assert "ztunnel_workers 2" in (await two.http("stats", "/metrics"))[1]


def held(pid: int) -> tuple[list[str], set[str]]:
    """Paths that a process has open, and the ports that it listens on, in hexadecimal."""
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return links, {row[1].split(":")[1] for row in rows if row[9] in inodes and row[3] == "0A"}


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_workers_hold_no_lock_no_page_and_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH_TOKEN", "confidential")
    monkeypatch.setenv("XDS_HEADER_x", "confidential")
    config = settings(ZTUNNEL_WORKER_THREADS="2", AUTH_TOKEN="confidential")
    with trio.fail_after(60):
        async with running(config, state=tmp_path / "state") as ztunnel:
            await ztunnel.sync()
            await ztunnel.until_ready()
            pages = {f"{ztunnel.address(page)[1]:04X}" for page in ("admin", "stats", "readiness")}
            traffic = {f"{ztunnel.address(what)[1]:04X}" for what in ("hbone", "inbound", "outbound")}
            plane = ztunnel.daemon.path
            assert isinstance(plane, supervisor.Supervisor)
            assert b"confidential" not in pickle.dumps(plane._setup())
            for pid in await pids(ztunnel):
                paths, ports = held(pid)
                assert not [path for path in paths if path.startswith(str(tmp_path))]
                assert not pages & ports
                assert traffic <= ports
                assert b"confidential" not in environment(pid)


async def test_a_policy_is_acknowledged_when_every_worker_has_it(two: Running) -> None:
    stream = await two.control.next_stream()
    await stream.opening()
    stream.respond(AUTHORIZATION_TYPE)
    stream.respond(ADDRESS_TYPE, [workload()])
    await stream.request()
    await stream.request()
    await two.until_ready()
    stopped = (await pids(two))[0]
    os.kill(stopped, signal.SIGSTOP)
    stream.respond(AUTHORIZATION_TYPE, [policy("p")], nonce="later")
    with trio.move_on_after(0.5) as early:
        await stream.request()
    assert early.cancelled_caught
    assert "shop/p" in two.daemon.mesh.store.policies
    os.kill(stopped, signal.SIGCONT)
    assert (await stream.request()).response_nonce == "later"
    assert stopped in await pids(two)


async def test_a_worker_that_does_not_take_a_change_is_replaced(two: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "CONFIRM", 2.0)
    stream = await two.control.next_stream()
    await stream.opening()
    stream.respond(AUTHORIZATION_TYPE)
    stream.respond(ADDRESS_TYPE, [workload()])
    await stream.request()
    await stream.request()
    await two.until_ready()
    stopped = (await pids(two))[0]
    os.kill(stopped, signal.SIGSTOP)
    stream.respond(AUTHORIZATION_TYPE, [policy("p")], nonce="later")
    assert (await stream.request()).response_nonce == "later"
    while stopped in await pids(two):
        await trio.sleep(0.02)
    await until(two, state="serving")
    assert "ztunnel_worker_restarts_total 1" in (await two.http("stats", "/metrics"))[1]


async def test_a_killed_worker_is_replaced_again_and_again(two: Running) -> None:
    await two.sync()
    await two.until_ready()
    for count in range(1, size(10, 3) + 1):
        os.kill((await pids(two))[0], signal.SIGKILL)
        while (await two.status())["workers"][0]["restarts"] < count:
            await trio.sleep(0.02)
        await until(two, state="serving")
    assert (await two.status())["workers"][1]["restarts"] == 0


async def test_the_status_names_the_workers(two: Running) -> None:
    await two.sync()
    await two.until_ready()
    first, second = await pids(two)
    (row,) = [line for line in printed(await two.status()) if line.startswith("workers")]
    assert row.split(maxsplit=1)[1] == f"2 of 2 serving (pid {first}, {second})"
    os.kill(first, signal.SIGKILL)
    while not (await two.status())["workers"][0]["restarts"]:
        await trio.sleep(0.02)
    await until(two, state="serving")
    (row,) = [line for line in printed(await two.status()) if line.startswith("workers")]
    assert row.endswith("1 replaced since the start")


async def test_workers_are_started_although_their_starter_was_killed(two: Running) -> None:
    await two.sync()
    await two.until_ready()
    before = await pids(two)
    plane = two.daemon.path
    assert isinstance(plane, supervisor.Supervisor)
    assert plane._starter is not None
    assert plane._starter._process is not None
    plane._starter._process.kill()
    assert await pids(two) == before  # they are not its children
    os.kill(before[1], signal.SIGKILL)
    while (await pids(two))[1] in (before[1], None):
        await trio.sleep(0.02)
    await until(two, state="serving")


async def test_what_waits_for_a_dead_worker_is_served_by_another(two: Running) -> None:
    await two.sync()
    await two.until_ready()
    stopped, _ = await pids(two)
    os.kill(stopped, signal.SIGSTOP)
    streams = [await trio.open_tcp_stream(*two.address("socks5")) for _ in range(20)]
    os.kill(stopped, signal.SIGKILL)
    for stream in streams:  # each greeting is answered, whoever had the connection in its queue
        await stream.send_all(b"\x05\x01\x00")
        assert await stream.receive_some(2) == b"\x05\x00"
        await stream.aclose()


async def test_the_log_level_reaches_every_worker(two: Running, capfd: pytest.CaptureFixture[str]) -> None:
    stream = await two.control.next_stream()
    await stream.opening()
    stream.respond(AUTHORIZATION_TYPE)
    stream.respond(ADDRESS_TYPE, [workload()])
    await stream.request()
    await stream.request()
    await two.until_ready()
    assert (await two.http("admin", "/logging?level=debug", "POST"))[0] == 200
    stream.respond(AUTHORIZATION_TYPE, [policy("p")])
    await stream.request()
    said = ""
    while not all(f'worker={number} what="delta"' in said for number in range(2)):  # it may come after the request
        said += capfd.readouterr().out
        await trio.sleep(0.02)
    assert (await two.http("admin", "/logging?level=info", "POST"))[0] == 200


async def test_config_dump_joins_what_all_have(two: Running) -> None:
    await two.sync()
    await two.until_ready()
    code, body = await two.http("admin", "/config_dump")
    assert code == 200
    found = json.loads(body)
    assert found["connections"] == {"inbound": [], "outbound": []}
    assert found["tunnels"] == []


async def test_a_drain_ends_every_process(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with running(settings(ZTUNNEL_WORKER_THREADS="2")) as ztunnel:
            await ztunnel.sync()
            await ztunnel.until_ready()
            processes = await pids(ztunnel)
    assert not [pid for pid in processes if runs(pid)]


# revocation lists


def test_what_revocation_lists_refused_outlives_a_worker() -> None:
    memory = make_memory()
    page = Page(memory)
    try:
        metrics = WorkerMetrics(memory, lambda _: None)
        metrics.crl_rejected("source")
        metrics.crl_rejected("destination")
        metrics.crl_rejected("destination")
        metrics.crl_untracked("destination")
        total = Counts()
        total.add(page.last_counts()[0])
        total.add(page.counts())
    finally:
        page.close()
    assert total.crl_rejected == {"source": 2, "destination": 4}
    assert total.crl_untracked == {"destination": 2}
