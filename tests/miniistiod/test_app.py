"""The whole control plane, over TLS and gRPC on the loopback address."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import stat
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL
from tests.support.callers import certificate as renewal
from tests.support.miniistiod import (
    ADDRESS,
    AUTHORIZATION,
    CREATE_CERTIFICATE,
    DELTA,
    MESH,
    Applicant,
    acknowledge,
    bearer,
    control_plane,
    subscribe,
    uid,
)

import miniistiod
from hbone.errors import ConfigurationError, HboneError
from hbone.grpc import GrpcError, StatusCode
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient
from miniistiod import admin_client, cli
from miniistiod.store import Store
from ztunnel.wire import authorization_pb2, discovery_pb2, workload_pb2
from ztunnel.wire.token import parse_enrolment_token

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from cryptography import x509

    from hbone.identity import Identity
    from hbone.trio.grpc import GrpcStream


@contextlib.asynccontextmanager
async def dial(
    cp: miniistiod.MiniIstiod, identity: Identity | None = None, name: str = "localhost"
) -> AsyncGenerator[GrpcClient]:
    tls = TlsContext.client(identity, roots=cp.root_pem, server_name=name)
    with trio.fail_after(20):
        async with GrpcClient.connect("127.0.0.1", cp.port, tls) as client:
            yield client


async def certificate(
    cp: miniistiod.MiniIstiod, metadata: list[tuple[str, str]], applicant: Applicant | None = None, **request: Any
) -> Identity:
    applicant = applicant or Applicant()
    async with dial(cp) as client:
        return applicant.identity(await client.unary(CREATE_CERTIFICATE, applicant.request(**request), metadata))


@contextlib.asynccontextmanager
async def discovery(
    cp: miniistiod.MiniIstiod, identity: Identity | None, metadata: list[tuple[str, str]] | None = None, **node: Any
) -> AsyncGenerator[Ztunnel]:
    async with dial(cp, identity) as client, client.stream(DELTA, metadata or []) as stream:
        await stream.send(subscribe(ADDRESS, **node))
        await stream.send(subscribe(AUTHORIZATION, **node))
        yield Ztunnel(stream)


class Ztunnel:
    """A client of discovery that takes everything."""

    def __init__(self, stream: GrpcStream) -> None:
        self.stream = stream
        self.addresses: dict[str, workload_pb2.Address] = {}
        self.policies: dict[str, authorization_pb2.Authorization] = {}

    async def response(self, times: int = 1) -> discovery_pb2.DeltaDiscoveryResponse:
        """Take the next response, or several; the last of them."""
        for _ in range(times):
            taken = await self._response()
        return taken

    async def _response(self) -> discovery_pb2.DeltaDiscoveryResponse:
        data = await self.stream.receive()
        assert data is not None
        response = discovery_pb2.DeltaDiscoveryResponse.FromString(data)
        await self.stream.send(acknowledge(response))
        for resource in response.resources:
            if response.type_url == ADDRESS:
                self.addresses[resource.name] = workload_pb2.Address.FromString(resource.resource.value)
            else:
                self.policies[resource.name] = authorization_pb2.Authorization.FromString(resource.resource.value)
        for name in response.removed_resources:
            self.addresses.pop(name, None)
            self.policies.pop(name, None)
        return response

    def tunnel(self, name: str) -> int:
        return self.addresses[uid(name)].workload.tunnel_protocol


async def test_enrolment_then_renewal_then_discovery(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = cp.create_token("shop", "orders", name="orders-1")
        identity = await certificate(cp, bearer(token))
        assert str(identity.id) == "spiffe://cluster.local/ns/shop/sa/orders"
        again = Applicant()
        async with dial(cp, identity) as client:
            renewed = again.identity(await client.unary(CREATE_CERTIFICATE, again.request(seconds=600)))
        assert renewed.id == identity.id
        async with discovery(cp, renewed) as ztunnel:
            assert [(await ztunnel.response()).type_url for _ in range(2)] == [AUTHORIZATION, ADDRESS]
            assert ztunnel.policies.keys() == {"shop/orders"}
            assert ztunnel.addresses.keys() == {uid("orders-1"), uid("web-1"), "shop/orders.mesh"}
            assert ztunnel.tunnel("orders-1") == workload_pb2.HBONE
            assert ztunnel.tunnel("web-1") == workload_pb2.NONE
        issued = cp.store.certificates(0.0)
        assert len(issued) == 2
        assert {item.caller.rpartition(" ")[0] for item in issued} == {"one-time token", ""}


def shown_chain(port: int) -> list[x509.Certificate]:
    """What the server shows to somebody who believes nobody yet."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.settimeout(None)
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_alpn_protos([b"h2"])
        connection = SSL.Connection(context, sock)
        connection.set_connect_state()
        connection.do_handshake()
        return list(connection.get_peer_cert_chain(as_cryptography=True) or [])


async def test_a_token_tells_the_root_that_the_server_shows(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = parse_enrolment_token(cp.create_token("shop", "orders"))
        chain = await trio.to_thread.run_sync(shown_chain, cp.port)
        assert [item.fingerprint(hashes.SHA256()) == token.root_sha256 for item in chain] == [False, True]


async def test_a_reusable_token_serves_a_stock_ztunnel(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = cp.create_token("shop", "web", reusable=True)
        for _ in range(2):
            identity = await certificate(cp, bearer(token))
            assert identity.id.service_account == "web"
        async with discovery(cp, None, bearer(token), name="web-1") as ztunnel:
            await ztunnel.response()
            await ztunnel.response()
            assert ztunnel.tunnel("web-1") == workload_pb2.HBONE


async def test_what_was_reached_by_hbone_stays_so(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        orders = await certificate(cp, bearer(cp.create_token("shop", "orders")))
        web = await certificate(cp, bearer(cp.create_token("shop", "web")))
        async with discovery(cp, web, name="web-1") as watcher:
            await watcher.response()
            await watcher.response()
            assert watcher.tunnel("orders-1") == workload_pb2.NONE
            async with discovery(cp, orders, name="orders-1") as ztunnel:
                await ztunnel.response()
                response = await watcher.response()
                assert [item.name for item in response.resources] == [uid("orders-1")]
                assert watcher.tunnel("orders-1") == workload_pb2.HBONE
    async with control_plane(tmp_path) as cp, discovery(cp, web, name="web-1") as watcher:
        await watcher.response()
        await watcher.response()
        assert watcher.tunnel("orders-1") == workload_pb2.HBONE
        (cp.config.config_dir / "mesh.yaml").write_text(
            MESH.replace("serviceAccount: orders}", "serviceAccount: other}")
        )
        await watcher.response()
        assert watcher.tunnel("orders-1") == workload_pb2.NONE  # another identity: it has proved nothing


async def test_a_mark_needs_the_service_account_of_the_entry(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        web = await certificate(cp, bearer(cp.create_token("shop", "web")))
        async with discovery(cp, web, name="orders-1") as ztunnel:
            await ztunnel.response()
            await ztunnel.response()
            assert ztunnel.tunnel("orders-1") == workload_pb2.NONE


async def test_a_token_for_one_name_makes_nobody_another(tmp_path: Path) -> None:
    twin = MESH.replace("name: web-1", "name: orders-2").replace("serviceAccount: web}", "serviceAccount: orders}")
    async with control_plane(tmp_path, twin) as cp:
        first = await certificate(cp, bearer(cp.create_token("shop", "orders", name="orders-1")))
        renewed = await renewal(cp, identity=first)
        async with discovery(cp, renewed, name="orders-2") as ztunnel:  # its account, and not its name
            await ztunnel.response()
            await ztunnel.response()
            assert ztunnel.tunnel("orders-1") == workload_pb2.HBONE
            assert ztunnel.tunnel("orders-2") == workload_pb2.NONE


async def refused(
    cp: miniistiod.MiniIstiod, path: str, message: bytes, metadata: list[tuple[str, str]] | None = None
) -> tuple[StatusCode, str]:
    async with dial(cp) as client:
        with pytest.raises(GrpcError) as caught:
            await client.unary(path, message, metadata or [])
    return caught.value.code, caught.value.message


async def test_errors_of_the_authority(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = Applicant().request()
    async with control_plane(tmp_path) as cp:
        unauthenticated = (StatusCode.UNAUTHENTICATED, "request authenticate failure")
        assert await refused(cp, CREATE_CERTIFICATE, request) == unauthenticated
        assert await refused(cp, CREATE_CERTIFICATE, request, bearer("nonsense")) == unauthenticated
        assert await refused(cp, CREATE_CERTIFICATE, b"\xff") == (
            StatusCode.INVALID_ARGUMENT,
            "the message cannot be parsed",
        )
        assert await refused(cp, CREATE_CERTIFICATE, b"") == unauthenticated  # who is not known hears no more
        token = cp.create_token("shop", "orders")
        assert await refused(cp, CREATE_CERTIFICATE, b"", bearer(token)) == (
            StatusCode.INVALID_ARGUMENT,
            "CSR signing error (certificate signing request is not properly encoded)",
        )
        assert await refused(cp, CREATE_CERTIFICATE, Applicant().request(seconds=7_776_001), bearer(token)) == (
            StatusCode.INVALID_ARGUMENT,
            "CSR signing error (requested TTL 7776001s is greater than the max allowed TTL 7776000s)",
        )
        await certificate(cp, bearer(token))  # a request that cannot be granted spends no token
        assert await refused(cp, CREATE_CERTIFICATE, request, bearer(token)) == unauthenticated
    for why in ("neither a client certificate nor a token", "not a token of this control plane", "was used already"):
        assert why in caplog.text  # ours to know


async def test_nobody_gets_the_certificate_of_another(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = cp.create_token("shop", "web", reusable=True)
        own = "spiffe://cluster.local/ns/shop/sa/web"
        for wanted in ("spiffe://cluster.local/ns/shop/sa/orders", "", own.upper(), "spiffe://other/ns/shop/sa/web"):
            assert await refused(cp, CREATE_CERTIFICATE, Applicant().request(impersonate=wanted), bearer(token)) == (
                StatusCode.UNAUTHENTICATED,
                "request impersonation authentication failure",
            )
        assert str((await certificate(cp, bearer(token), impersonate=own)).id) == own


async def test_a_lost_answer_can_be_fetched_again_with_the_same_key(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token, applicant = cp.create_token("shop", "orders"), Applicant()
        first = await certificate(cp, bearer(token), applicant)
        second = await certificate(cp, bearer(token), applicant)
        assert first.id == second.id


async def test_errors_of_discovery(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        assert (await refused(cp, DELTA, subscribe()))[0] is StatusCode.UNAUTHENTICATED
        once = bearer(cp.create_token("shop", "orders"))
        assert (await refused(cp, DELTA, subscribe(), once))[0] is StatusCode.UNAUTHENTICATED
        empty = discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS).SerializeToString()
        assert await refused(cp, DELTA, empty, token) == (StatusCode.INVALID_ARGUMENT, "missing node information")
        code, message = await refused(cp, DELTA, subscribe(namespace="web"), token)
        assert code is StatusCode.PERMISSION_DENIED
        assert message.startswith("authorization failed")
        assert (await refused(cp, DELTA.replace("Delta", "Stream"), b"", token))[0] is StatusCode.INVALID_ARGUMENT
        assert (await refused(cp, "/a.B/C", b""))[0] is StatusCode.UNIMPLEMENTED


async def test_a_workload_cannot_pose_as_the_control_plane(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        identity = await certificate(cp, bearer(cp.create_token("shop", "orders")))

        async def pretend(task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
            from hbone.trio.grpc import GrpcServer

            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            task_status.started(listeners[0].socket.getsockname()[1])
            await GrpcServer({}).serve(listeners, lambda: TlsContext.server(identity, "optional"))

        async with trio.open_nursery() as nursery:
            port = await nursery.start(pretend)
            for name in ("localhost", "127.0.0.1", "istiod.istio-system.svc"):
                tls = TlsContext.client(roots=cp.root_pem, server_name=name)
                with pytest.raises(HboneError):
                    async with GrpcClient.connect("127.0.0.1", port, tls):
                        pass
            nursery.cancel_scope.cancel()


async def test_the_control_planes_certificate_is_refused_as_a_workloads(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        identity = await certificate(cp, bearer(cp.create_token("shop", "orders")))
        with pytest.raises(HboneError), trio.fail_after(10):
            async with GrpcClient.connect("127.0.0.1", cp.port, TlsContext.client(identity)):
                pass


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "istiod.istio-system.svc", "mesh.example.com"])
async def test_the_certificate_has_every_name(tmp_path: Path, name: str) -> None:
    async with control_plane(tmp_path, names=("mesh.example.com", "192.0.2.9")) as cp:
        async with dial(cp, name=name):
            pass
        with pytest.raises(HboneError):
            async with dial(cp, name="other.example.com"):
                pass


async def test_changes_are_pushed_and_bad_documents_are_not(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        path = cp.config.config_dir / "mesh.yaml"
        orders = await certificate(cp, bearer(cp.create_token("shop", "orders", name="orders-1")))
        async with discovery(cp, orders) as ztunnel:
            await ztunnel.response()
            await ztunnel.response()
            path.write_text(MESH.replace("kind: WorkloadEntry", "kind: WorkloadEntri", 1))
            while not cp.status.problems:
                await trio.sleep(0.01)
            assert cp.status.problems[0].startswith("mesh.yaml:3: error: the kind 'WorkloadEntri'")
            assert (await page(cp, "/ready"))[1]["status"] == "degraded"
            path.write_text(MESH.replace("10.1.0.2", "10.1.0.22"))
            response = await ztunnel.response()
            assert [item.name for item in response.resources] == [uid("web-1")]
            assert not cp.status.problems
            path.unlink()
            while not cp.status.problems:
                await trio.sleep(0.01)
            assert "has no document" in cp.status.problems[0]
            assert len(cp.mesh.catalog.addresses) == 3
            path.write_text(MESH.partition("---")[0])
            response = await ztunnel.response()
            assert sorted(response.removed_resources) == [uid("web-1"), "shop/orders.mesh"]
            assert (await ztunnel.response()).removed_resources == ["shop/orders"]


async def test_a_restart_with_bad_documents_serves_the_last_good_ones(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        before = {name: item.version for name, item in cp.mesh.catalog.addresses.items()}
    async with control_plane(tmp_path, "kind: nonsense") as cp:
        assert cp.status.loaded
        assert cp.status.problems
        assert {name: item.version for name, item in cp.mesh.catalog.addresses.items()} == before
        status, body = await page(cp, "/ready")
        assert (status, body["status"]) == (200, "degraded")


async def test_a_restart_without_documents_serves_the_last_good_ones(tmp_path: Path) -> None:
    async with control_plane(tmp_path):
        pass
    (tmp_path / "mesh" / "mesh.yaml").unlink()
    async with control_plane(tmp_path, None) as cp:
        assert cp.status.loaded
        assert "has no document" in cp.status.problems[0]
        assert len(cp.mesh.catalog.addresses) == 3


async def test_nothing_is_served_before_the_first_good_documents(tmp_path: Path) -> None:
    async with control_plane(tmp_path, "kind: nonsense") as cp:
        assert (await page(cp, "/ready"))[0] == 503
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        assert (await refused(cp, DELTA, subscribe(), token))[0] is StatusCode.UNAVAILABLE
        await certificate(cp, token)
        (cp.config.config_dir / "mesh.yaml").write_text(MESH)
        while not cp.status.loaded:
            await trio.sleep(0.01)
        async with discovery(cp, None, token) as ztunnel:
            await ztunnel.response()


async def test_a_rejection_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with control_plane(tmp_path) as cp:
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        async with discovery(cp, None, token) as ztunnel:
            data = await ztunnel.stream.receive()
            assert data is not None
            response = discovery_pb2.DeltaDiscoveryResponse.FromString(data)
            await ztunnel.stream.send(acknowledge(response, "shop/orders: \x1b[31mno"))
            while True:
                (shown,) = await admin(cp, "/subscribers")
                if shown["types"][AUTHORIZATION]["rejected"] == "shop/orders: \x1b[31mno":
                    break
                await trio.sleep(0.01)
            arguments = ["get", "subscribers", "--state", str(tmp_path / "state")]
            assert await trio.to_thread.run_sync(cli.main, arguments) == 0
            out = capsys.readouterr().out  # what a client says is nothing that a terminal obeys
            assert r"1 policies (sent), 3 addresses (sent)  shop/orders: \x1b[31mno" in out


async def test_a_warning_comes_and_goes_with_a_document_that_nobody_is_sent(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        before = (await admin(cp, "/ready"))["warnings"]
        path = tmp_path / "mesh" / "slice.yaml"
        path.write_text(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
            "metadata: {name: e, labels: {kubernetes.io/service-name: nobody}}\naddressType: IPv4\n"
        )

        async def until(count: int) -> list[str]:
            with trio.fail_after(30):
                while len(found := (await admin(cp, "/ready"))["warnings"]) != count:
                    await trio.sleep(0.01)
            return [text for text in found if text not in before]

        (warning,) = await until(len(before) + 1)
        assert "the Service nobody, which is not there" in warning
        path.unlink()
        assert await until(len(before)) == []


async def test_a_third_stream_of_a_node_ends_the_oldest(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for _ in range(3):
                clients.append(await stack.enter_async_context(discovery(cp, None, token)))
                await clients[-1].response()
            with pytest.raises(GrpcError, match="took the place"):
                await clients[0].response(times=100)
            await clients[1].response()


async def test_ending_tells_the_clients(tmp_path: Path) -> None:
    async def serve(task_status: trio.TaskStatus[miniistiod.MiniIstiod] = trio.TASK_STATUS_IGNORED) -> None:
        async with control_plane(tmp_path) as cp:
            task_status.started(cp)
            await end.wait()

    end = trio.Event()
    async with trio.open_nursery() as nursery:
        cp = await nursery.start(serve)
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        async with discovery(cp, None, token) as ztunnel:
            await ztunnel.response()
            await ztunnel.response()
            end.set()
            with pytest.raises(GrpcError) as caught:
                await ztunnel.response()
        assert caught.value.code is StatusCode.UNAVAILABLE
    assert not (tmp_path / "state" / "admin.sock").exists()


async def test_a_state_is_used_by_one_control_plane(tmp_path: Path) -> None:
    async with control_plane(tmp_path):
        with pytest.raises(ConfigurationError, match="another miniistiod runs"):
            async with control_plane(tmp_path):
                pass


async def test_another_trust_domain_than_the_states_is_refused(tmp_path: Path) -> None:
    async with control_plane(tmp_path, trust_domain="mesh.example") as cp:
        assert cp.trust_domain == "mesh.example"
        identity = await certificate(cp, bearer(cp.create_token("shop", "orders")))
        assert str(identity.id) == "spiffe://mesh.example/ns/shop/sa/orders"
        assert cp.mesh.catalog.addresses[uid("orders-1")]
    with pytest.raises(ConfigurationError, match=r"is of the trust domain 'mesh\.example', not"):
        async with control_plane(tmp_path, trust_domain="other"):
            pass
    (tmp_path / "mesh" / "meshconfig.yaml").write_text("trustDomain: other\n")
    async with control_plane(tmp_path) as cp:
        assert "meshconfig.yaml says trustDomain 'other'" in cp.status.problems[0]


async def test_the_mesh_config_names_the_trust_domain_of_a_new_state(tmp_path: Path) -> None:
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "meshconfig.yaml").write_text("trustDomain: from.config\n")
    async with control_plane(tmp_path) as cp:
        assert cp.trust_domain == "from.config"


async def test_a_fault_of_the_block_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with control_plane(tmp_path):
            raise KeyError("mine")


async def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        config = miniistiod.Config(
            config_dir=tmp_path / "mesh",
            state_dir=tmp_path / "state2",
            init=True,
            listen=miniistiod.Address("127.0.0.1", cp.port),
        )
        with pytest.raises(ConfigurationError, match=r"cannot listen on 127\.0\.0\.1:.*choose another"):
            async with miniistiod.MiniIstiod(config):
                pass
        assert not config.state_dir.exists()  # there is no root that nobody serves by
        config = attrs.evolve(config, listen=miniistiod.Address("127.0.0.1", 0), monitoring=cp.config.monitoring)
        async with miniistiod.MiniIstiod(config) as other:
            assert other.root_pem != cp.root_pem


# -- pages


async def page(cp: miniistiod.MiniIstiod, path: str) -> tuple[int, Any]:
    host, port = cp.monitoring_addresses[0]
    stream = await trio.open_tcp_stream(host, port)
    async with stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        data = b"".join([chunk async for chunk in stream])
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if b"json" in head else body.decode()


async def admin(cp: miniistiod.MiniIstiod, path: str) -> Any:
    return await trio.to_thread.run_sync(admin_client.fetch, cp.config.state_dir / "admin.sock", path)


async def test_pages(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        await certificate(cp, bearer(cp.create_token("shop", "orders", reusable=True)))
        assert await page(cp, "/ready") == (
            200,
            {"status": "ok", "problems": [], "since": cp.status.since, "warnings": 2},
        )
        status, text = await page(cp, "/metrics")
        assert status == 200
        assert 'citadel_server_success_cert_issuance_total{caller="reusable token"} 1.0' in text
        assert "miniistiod_documents_degraded 0.0" in text
        assert (await page(cp, "/workloads"))[0] == 404
        assert stat.S_IMODE((tmp_path / "state" / "admin.sock").stat().st_mode) == 0o600
        assert [item["name"] for item in await admin(cp, "/workloads")] == [uid("orders-1"), uid("web-1")]
        assert [item["at"] for item in await admin(cp, "/services")] == [["/10.9.0.1"]]
        assert [item["name"] for item in await admin(cp, "/policies")] == ["shop/orders"]
        (issued,) = await admin(cp, "/certificates")
        assert issued["spiffe_id"] == "spiffe://cluster.local/ns/shop/sa/orders"
        assert len((await admin(cp, "/ready"))["warnings"]) == 2
        assert ipaddress.ip_address(cp.addresses[0][0]).is_loopback


async def test_get_shows_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with control_plane(tmp_path) as cp:
        cp.create_token("shop", "orders", reusable=True, lifetime=86_400.0)
        await certificate(cp, bearer(cp.create_token("shop", "orders")))
        for what in ("workloads", "services", "policies", "conditions", "certificates", "subscribers"):
            arguments = ["get", what, "--state", str(tmp_path / "state")]
            assert await trio.to_thread.run_sync(cli.main, arguments) == 0
            assert await trio.to_thread.run_sync(cli.main, [*arguments, "--json"]) == 0
        shown = capsys.readouterr()
        assert "shop/orders-1  10.1.0.1  orders" in shown.out
        assert "AuthorizationPolicy shop/orders  ZtunnelAccepted  yes    Accepted  in force" in shown.out
        assert "expires in 24.0 hours" in shown.err
    with Store.open(tmp_path / "state") as store:
        assert len(store.list_tokens()) == 2
