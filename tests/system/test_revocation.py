"""Certificates taken back: by `miniistiod revoke`, and by a file of lists; between processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from tests.support.shop import echo, ended, open_stream, shop, until

from miniistiod import ca
from miniistiod.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.testing.mesh import Mesh

REVOKED = "connection closed: peer certificate revoked by CRL"


def _certificate(running: Mesh, host: str) -> x509.Certificate:
    return x509.load_pem_x509_certificates((running.directory / f"{host}-state" / "svid.pem").read_bytes())[0]


def _list(running: Mesh, host: str, path: Path) -> None:
    """Put a list that names the certificate of `host` where CRL_PATH points."""
    leaf = _certificate(running, host)
    with Store.open(running.directory / "state") as store:
        begin = leaf.not_valid_before_utc
        found = ca.make_crl(store.signer(), [(leaf.serial_number, begin.timestamp())], number=99, now=begin)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(found.public_bytes(serialization.Encoding.PEM))
    temporary.rename(path)


async def _rejections(running: Mesh, host: str, reporter: str = "") -> float:
    samples = await running.ztunnels[host].metrics()
    family = [(name, value) for name, value in samples.items() if name.startswith("istio_crl_policy_rejections_total")]
    return sum(value for name, value in family if f'reporter="{reporter}' in name)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_revoke_cuts_a_live_connection_and_later_ones(tmp_path: Path, workers: str) -> None:
    environment = {"ZTUNNEL_WORKER_THREADS": workers}
    async with shop(tmp_path, namespaces=False, environment=environment) as running:
        assert await until(lambda: (tmp_path / "alpha-state" / "svid.pem").exists())
        stream = await open_stream(running)
        serial = f"{_certificate(running, 'alpha').serial_number:x}"
        running.cli("revoke", "--state", str(tmp_path / "state"), "--serial", serial)
        assert await ended(stream, 30)
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
        stream = await open_stream(running)
        _list(running, "alpha", path)
        assert await ended(stream, 30)
        await running.ztunnels["beta"].until_logged(error=REVOKED)
        assert await echo(running) == b""


@pytest.mark.netns
@pytest.mark.parametrize(
    ("revoked", "judge", "reporter"), [("alpha", "beta", "destination"), ("beta", "alpha", "source")]
)
async def test_captured_connections_end_and_new_ones_are_refused_by_either_side(
    tmp_path: Path, revoked: str, judge: str, reporter: str
) -> None:
    path = tmp_path / "lists.pem"
    async with shop(tmp_path, namespaces=True, environment={"CRL_PATH": str(path)}) as running:
        assert await until(lambda: (tmp_path / f"{revoked}-state" / "svid.pem").exists(), seconds=30)
        stream = await open_stream(running)
        _list(running, revoked, path)
        assert await ended(stream, 30)
        await running.ztunnels[judge].until_logged(error=REVOKED)
        before = await _rejections(running, judge, reporter)
        assert before >= 1
        assert await echo(running) == b""
        assert await _rejections(running, judge, reporter) > before
        other = "alpha" if judge == "beta" else "beta"
        assert await _rejections(running, other) == 0
