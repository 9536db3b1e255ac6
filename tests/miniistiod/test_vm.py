"""The life of a machine, with our ztunnel on it: token, certificate, reboot, long sleep, and the way back."""

from __future__ import annotations

import contextlib
import datetime
import time
from typing import TYPE_CHECKING

import trio
from tests.miniistiod.test_registrar import GROUPS, state_of, until, workload
from tests.support.miniistiod import control_plane

from miniistiod import issue_tokens
from ztunnel.config import Config
from ztunnel.control.cache import StateDir
from ztunnel.control.enroll import enroll
from ztunnel.control.transport import ServerAddress
from ztunnel.membership import Membership
from ztunnel.metrics import Metrics
from ztunnel.wire import workload_pb2
from ztunnel.wire.token import parse_enrolment_token

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    import miniistiod

SHORT = datetime.timedelta(seconds=0.05)


def token(cp: miniistiod.MiniIstiod, *, group: str = "") -> issue_tokens.NewToken:
    return issue_tokens.create(
        cp.store,
        namespace="shop",
        service_account="carts",
        name="vm-1",
        lifetime=None,
        reusable=False,
        now=time.time(),
        group=group,
    )


def settings(cp: miniistiod.MiniIstiod, state: Path) -> Config:
    address = f"https://localhost:{cp.port}"
    return Config.from_env(
        {
            "PROXY_WORKLOAD_INFO": "shop/vm-1/carts",
            "XDS_ADDRESS": address,
            "CA_ADDRESS": address,
            "INSTANCE_IP": "10.2.0.1",
            "ZTUNNEL_STATE_DIR": str(state),
        }
    )


async def join(cp: miniistiod.MiniIstiod, state: Path, text: str) -> None:
    directory = StateDir.open(state)
    try:
        await enroll(ServerAddress(host="localhost", port=cp.port), parse_enrolment_token(text), directory, name="vm-1")
    finally:
        directory.release()


@contextlib.asynccontextmanager
async def machine(
    cp: miniistiod.MiniIstiod, state: Path, wall: Callable[[], float] = time.time
) -> AsyncGenerator[Membership]:
    directory = StateDir.open(state)
    try:
        mesh = Membership(settings(cp, state), Metrics("test"), directory, wall=wall)
        mesh.restore()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mesh.run)
            yield mesh
            nursery.cancel_scope.cancel()
    finally:
        directory.release()


async def test_from_token_to_long_sleep_and_back(tmp_path: Path) -> None:
    state = tmp_path / "vm"
    async with control_plane(tmp_path, GROUPS, registration_grace=SHORT) as cp:
        await join(cp, state, token(cp, group="carts").text)
        for reboot in range(2):
            async with machine(cp, state) as mesh:
                await until(lambda: workload(cp) is not None)
                await until(lambda mesh=mesh: mesh.own_workload() is not None)
                found = workload(cp)
                assert found is not None
                assert (found.tunnel_protocol, found.workload_name) == (workload_pb2.HBONE, "carts")
                assert mesh.svids.current() is not None
            await until(lambda: state_of(cp) == "gone")
            assert len(cp.store.certificates(0.0)) == 1, f"reboot {reboot} needed a certificate"
        async with machine(cp, state, wall=lambda: time.time() + 2 * 86_400) as mesh:
            assert mesh.discovery is not None
            await until(lambda: (mesh.discovery.status().last_error or "").startswith("UNAUTHENTICATED"))
            told = mesh.discovery.status().last_error or ""
            assert "--namespace shop --service-account carts --name vm-1'" in told
            command = f"ztunnel enroll --server localhost:{cp.port} --token-file FILE"
            assert f"'ZTUNNEL_STATE_DIR={state} {command}'" in told
            await until(lambda: mesh.svids.status().last_error is not None)
            assert "miniistiod token create" in (mesh.svids.status().last_error or "")
            assert workload(cp) is None
        await join(cp, state, token(cp).text)  # as told: the group is remembered with the name
        async with machine(cp, state) as mesh:
            await until(lambda: workload(cp) is not None)
            assert state_of(cp) == "connected"
