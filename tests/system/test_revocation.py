"""Certificates taken back: by `miniistiod revoke`, and by a file of lists; between processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from tests.support.shop import ECHO, echo, shop, until

from miniistiod import ca
from miniistiod.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.testing.mesh import Mesh

REVOKED = "connection closed: peer certificate revoked by CRL"


async def _open(running: Mesh) -> trio.SocketStream:
    stream = await running.connect("alpha", running.hosts["beta"].address, ECHO)
    await stream.send_all(b"first")
    assert await stream.receive_some() == b"first"
    return stream


async def _ends(stream: trio.SocketStream) -> bool:
    ended = False
    with trio.move_on_after(15):
        try:
            ended = not await stream.receive_some()
        except trio.BrokenResourceError:
            ended = True
    await trio.aclose_forcefully(stream)
    return ended


def _certificate(running: Mesh, host: str) -> x509.Certificate:
    return x509.load_pem_x509_certificates((running.directory / f"{host}-state" / "svid.pem").read_bytes())[0]


async def _rejections(running: Mesh, host: str) -> float:
    samples = await running.ztunnels[host].metrics()
    return sum(value for name, value in samples.items() if name.startswith("istio_crl_policy_rejections_total"))


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_revoke_cuts_a_live_connection_and_later_ones(tmp_path: Path, workers: str) -> None:
    environment = {"ZTUNNEL_WORKER_THREADS": workers}
    async with shop(tmp_path, namespaces=False, environment=environment) as running:
        assert await until(lambda: (tmp_path / "alpha-state" / "svid.pem").exists())
        stream = await _open(running)
        serial = f"{_certificate(running, 'alpha').serial_number:x}"
        running.cli("revoke", "--state", str(tmp_path / "state"), "--serial", serial)
        assert await _ends(stream)
        record = await running.ztunnels["beta"].until_logged(error=REVOKED)
        assert record["src.identity"].endswith("/sa/client")
        assert await _rejections(running, "beta") >= 1
        assert await echo(running) == b""
        assert (tmp_path / "beta-state" / "crl.pem").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_file_of_lists_cuts_a_live_connection_when_it_changes(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "lists.pem"
    environment = {"CRL_PATH": str(path), "ZTUNNEL_WORKER_THREADS": workers}
    async with shop(tmp_path, namespaces=False, environment=environment) as running:
        await running.ztunnels["beta"].until_logged(message="revocation lists are missing", path=str(path))
        assert await until(lambda: (tmp_path / "alpha-state" / "svid.pem").exists())
        stream = await _open(running)
        leaf = _certificate(running, "alpha")
        with Store.open(tmp_path / "state") as store:
            begin = leaf.not_valid_before_utc
            found = ca.make_crl(store.signer(), [(leaf.serial_number, begin.timestamp())], number=99, now=begin)
        (tmp_path / "lists.tmp").write_bytes(found.public_bytes(serialization.Encoding.PEM))
        (tmp_path / "lists.tmp").rename(path)
        assert await _ends(stream)
        await running.ztunnels["beta"].until_logged(error=REVOKED)
        assert await echo(running) == b""
