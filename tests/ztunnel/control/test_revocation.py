from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from hbone.errors import ConfigurationError, IdentityError
from hbone.identity import RevocationLists
from hbone.testing.ca import TestCa
from ztunnel.control import revocation
from ztunnel.control.cache import StateDir
from ztunnel.control.revocation import Revocations, pack_lists, read_file, read_resource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography import x509

CA = TestCa()
WEB, API = CA.svid("shop", "web"), CA.svid("shop", "api")
FIRST, SECOND = CA.crl(WEB.leaf), CA.crl(API.leaf)


def pem(*lists: x509.CertificateRevocationList) -> bytes:
    return b"".join(found.public_bytes(serialization.Encoding.PEM) for found in lists)


def der(found: x509.CertificateRevocationList) -> bytes:
    return found.public_bytes(serialization.Encoding.DER)


CERTIFICATE = CA.certificate.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("data", "lists"),
    [
        pytest.param(b"", (), id="empty"),
        pytest.param(b"\n", (), id="a blank line"),
        pytest.param(pem(FIRST), (FIRST,), id="PEM"),
        pytest.param(pem(FIRST, SECOND), (FIRST, SECOND), id="PEM of two"),
        pytest.param(CERTIFICATE + pem(FIRST) + CERTIFICATE, (FIRST,), id="beside certificates"),
        pytest.param(CERTIFICATE, (), id="no list among the blocks"),
        pytest.param(der(FIRST), (FIRST,), id="DER"),
    ],
)
def test_a_file_is_read_as_it_is_meant(data: bytes, lists: tuple[x509.CertificateRevocationList, ...]) -> None:
    assert read_file(data).lists == lists


@pytest.mark.parametrize(
    ("data", "word"),
    [
        pytest.param(b"revoked: all of them", "list 1 cannot be parsed", id="text"),
        pytest.param(b"\x30\x82\x01", "cannot be parsed", id="cut DER"),
        pytest.param(der(FIRST) + b"x", "cannot be parsed", id="something behind it"),
        pytest.param(pem(FIRST)[:-30], "the file is cut", id="cut PEM"),
        pytest.param(pem(FIRST, SECOND)[:-200], "the file is cut", id="cut in the second"),
        pytest.param(pem(FIRST) + pem(SECOND)[:60] + pem(SECOND)[90:], "list 2 cannot be parsed", id="damaged"),
    ],
)
def test_junk_is_refused_in_one_sentence(data: bytes, word: str) -> None:
    with pytest.raises(IdentityError, match=word):
        read_file(data)


@given(st.binary(max_size=300), st.sampled_from([b"", b"-----BEGIN X509 CRL-----\n", der(FIRST)[:40]]))
def test_nothing_else_than_that_error_comes_out_of_a_file(data: bytes, start: bytes) -> None:
    for read in (read_file, read_resource):
        try:
            read(start + data)
        except IdentityError:
            pass


def test_lists_arrive_as_they_were() -> None:
    assert read_resource(pack_lists(RevocationLists([FIRST, SECOND]))).lists == (FIRST, SECOND)
    assert read_resource(b"").lists == ()


# the file


@pytest.mark.parametrize("content", [pytest.param(b"junk", id="junk"), pytest.param(pem(FIRST)[:-30], id="cut"), None])
def test_a_start_with_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "crl.pem"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"CRL_PATH '.*crl.pem' cannot be used: .*; repair the file, or unset"):
        Revocations(path)


def test_a_file_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation, "MAX_FILE", 100)
    (tmp_path / "crl.pem").write_bytes(pem(FIRST))
    with pytest.raises(ConfigurationError, match="larger than 100 bytes"):
        Revocations(tmp_path / "crl.pem")


async def at_once(call: Callable[..., object], *arguments: object) -> object:
    await trio.lowlevel.checkpoint()
    return call(*arguments)


class Watched:
    """A watched file; `at(seconds)` lets its mock clock go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.revocations = Revocations(path, in_thread=at_once)  # the mock clock does not wait for threads
        self.changes: list[tuple[x509.CertificateRevocationList, ...]] = []
        self.revocations.subscribe(lambda: self.changes.append(self.revocations.current.lists))

    def write(self, data: bytes) -> None:
        fresh = self.path.with_name(f"{random.random()}")
        fresh.write_bytes(data)
        fresh.rename(self.path)

    async def pass_by(self) -> None:
        await trio.sleep(revocation.POLL + 2 * revocation.QUIET + 1)


@pytest.fixture
async def watched(tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> Watched:
    path = tmp_path / "crl.pem"
    path.write_bytes(pem(FIRST))
    watched = Watched(path)
    nursery.start_soon(watched.revocations.run)
    return watched


async def test_a_new_content_comes_into_force(autojump_clock: trio.testing.MockClock, watched: Watched) -> None:
    assert watched.revocations.current.lists == (FIRST,)
    watched.write(pem(FIRST, SECOND))
    await watched.pass_by()
    watched.write(b"")
    await watched.pass_by()
    assert watched.changes == [(FIRST, SECOND), ()]
    assert watched.revocations.error is None


async def test_a_broken_or_missing_file_leaves_the_lists_before_in_force(
    autojump_clock: trio.testing.MockClock, watched: Watched
) -> None:
    watched.write(b"junk")
    await watched.pass_by()
    assert watched.revocations.error == "revocation list 1 cannot be parsed"
    watched.path.unlink()
    await watched.pass_by()
    assert watched.revocations.error == "No such file or directory"
    assert watched.changes == []
    assert watched.revocations.current.lists == (FIRST,)
    watched.write(pem(SECOND))
    await watched.pass_by()
    assert watched.changes == [(SECOND,)]
    assert watched.revocations.error is None


async def test_the_same_content_again_changes_nothing(autojump_clock: trio.testing.MockClock, watched: Watched) -> None:
    before = watched.revocations.current
    watched.write(pem(FIRST))
    await watched.pass_by()
    assert watched.changes == []
    assert watched.revocations.current is before


async def test_a_file_that_changes_without_pause_is_read_all_the_same(
    autojump_clock: trio.testing.MockClock, watched: Watched
) -> None:
    for number in range(12):
        watched.write(pem(SECOND) + b"\n" * number)
        await trio.sleep(revocation.POLL)
    assert watched.changes == [(SECOND,)]


async def test_a_file_that_comes_late_is_read(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    watched = Watched(tmp_path / "crl.pem")
    assert watched.revocations.error == "the file is missing"
    nursery.start_soon(watched.revocations.run)
    await watched.pass_by()
    watched.write(pem(FIRST))
    await watched.pass_by()
    assert watched.changes == [(FIRST,)]


# discovery


async def test_file_and_mesh_are_in_force_together(tmp_path: Path) -> None:
    (tmp_path / "crl.pem").write_bytes(pem(FIRST))
    revocations = Revocations(tmp_path / "crl.pem")
    await revocations.received(pack_lists(RevocationLists([SECOND])))
    for svid in (WEB, API):
        assert revocations.current.find((svid.leaf, CA.certificate)) is not None
    await revocations.received(None)
    assert revocations.current.lists == (FIRST,)


async def test_what_the_mesh_sent_outlives_a_restart(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    await Revocations(state=state).received(pack_lists(RevocationLists([FIRST])))
    assert (tmp_path / "crl.pem").stat().st_mode & 0o777 == 0o600
    later = Revocations(state=state)
    later.restore()
    assert later.current.lists == (FIRST,)
    (tmp_path / "crl.pem").write_bytes(b"junk")
    damaged = Revocations(state=state)
    damaged.restore()
    assert not damaged.current


async def test_a_resource_that_cannot_be_read_leaves_the_lists_before_in_force() -> None:
    revocations = Revocations()
    await revocations.received(pack_lists(RevocationLists([FIRST])))
    with pytest.raises(IdentityError):
        await revocations.received(b"\xff")
    assert revocations.current.lists == (FIRST,)
