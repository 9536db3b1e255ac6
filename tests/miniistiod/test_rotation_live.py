"""A root is rotated under a mesh that never stops shaking hands: no handshake fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from tests.miniistiod.test_registrar import GROUPS, until
from tests.miniistiod.test_vm import join as enrol
from tests.miniistiod.test_vm import token
from tests.support import tls
from tests.support.miniistiod import control_plane

from hbone.identity.svid import issued_by
from hbone.tls import TlsConnection, TlsContext
from miniistiod import ca, cli
from miniistiod.rotation import Step
from ztunnel.config import Config
from ztunnel.control.cache import StateDir
from ztunnel.membership import Membership
from ztunnel.metrics import Metrics

if TYPE_CHECKING:
    from pathlib import Path

    import miniistiod
    from hbone.identity import Identity

LIFETIME = "3s"


def shake_hands(client: Identity, server: Identity) -> None:
    """As two ztunnels do, each with what it holds now."""
    one = TlsConnection(TlsContext.client(client), server=False)
    other = TlsConnection(TlsContext.server(server), server=True)
    assert tls.join(one, other) == (None, None)
    assert (one.peer_id, other.peer_id) == (server.id, client.id)


def membership(cp: miniistiod.MiniIstiod, state: StateDir) -> Membership:
    address = f"https://localhost:{cp.port}"
    environ = {"PROXY_WORKLOAD_INFO": "shop/vm-1/carts", "XDS_ADDRESS": address, "CA_ADDRESS": address}
    config = Config.from_env({**environ, "SECRET_TTL": LIFETIME, "INSTANCE_IP": "10.2.0.1"})
    mesh = Membership(config, Metrics("test"), state)
    mesh.restore()
    return mesh


def signer_of(identity: Identity) -> str:
    (root,) = [root for root in identity.bundles["cluster.local"].roots if issued_by(identity.svid.leaf, root)]
    return ca.fingerprint(root)


def known_roots(host: Membership) -> int:
    identity = host.svids.current()
    assert identity is not None
    return len(identity.bundles["cluster.local"].roots)


async def test_no_handshake_fails_while_the_root_is_rotated(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        states = []
        for name in ("one", "two"):
            await enrol(cp, tmp_path / name, token(cp).text)
            states.append(StateDir.open(tmp_path / name))
        # What enrolment gave lives for a day, and the rotation would wait for its end.
        cp.store._connection.execute("UPDATE certificates SET expires = issued")
        hosts = [membership(cp, state) for state in states]
        count = 0
        signers: set[str] = set()
        command = ["--state", str(cp.config.state_dir)]

        async def everybody_all_the_time() -> None:
            nonlocal count
            while True:
                identities = [host.svids.current() for host in hosts]
                assert all(identities)
                for client in identities:
                    for server in identities:
                        assert client is not None
                        assert server is not None
                        shake_hands(client, server)
                        count += 1
                signers.update(signer_of(identity) for identity in identities if identity is not None)
                await trio.sleep(0.005)

        async with trio.open_nursery() as nursery:
            for host in hosts:
                await trio.sleep(0.3)  # so that they do not renew in step
                host.svids._plan(0.0)
                nursery.start_soon(host.run)
            await until(lambda: all((found := host.svids.status()).renew_in and found.renew_in < 3 for host in hosts))
            nursery.start_soon(everybody_all_the_time)
            old = ca.fingerprint(cp.store.signer().certificate)
            await trio.to_thread.run_sync(cli.main, ["root", "rotate", *command, "--skew", "0.3s"])
            await until(lambda: (r := cp.store.rotation()) is not None and r.step is Step.SIGNING)
            await until(lambda: len(signers) == 2)
            await trio.to_thread.run_sync(cli.main, ["root", "rotate", *command, "--finish", "serving", "--now"])
            await until(lambda: cp.store.rotation() is None)
            dials = len(cp.store.certificates(0.0))
            await until(lambda: len(cp.store.certificates(0.0)) > dials)  # over the new certificate of 15012
            await until(lambda: all(known_roots(host) == 1 for host in hosts))
            nursery.cancel_scope.cancel()
        assert count > 100
        assert len(signers) == 2
        assert old not in {ca.fingerprint(root) for root in cp.store.roots()}
        for host, state in zip(hosts, states, strict=True):
            assert host.svids.status().last_error is None
            state.release()
