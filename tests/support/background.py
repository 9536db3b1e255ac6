"""What all tests of a module share runs in a thread with a Trio loop of its own."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, TypeVar

import trio
from cryptography.hazmat.primitives.asymmetric import ec

from hbone.testing.ca import TestCa
from miniistiod.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from hbone.testing.mesh import Mesh

__all__ = ["background", "mesh_ca"]

T = TypeVar("T")


@contextlib.contextmanager
def background(manager: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """Enter an async context manager in a thread for the body, and leave it there afterwards."""
    answer: queue.Queue[T | BaseException] = queue.Queue()
    stop = trio.Event()
    token: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        async with manager() as value:
            answer.put(value)
            await stop.wait()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            answer.put(error)

    thread = threading.Thread(target=run, name="background")
    thread.start()
    try:
        found = answer.get(timeout=240)
        if isinstance(found, BaseException):
            raise found
        yield found
    finally:
        with contextlib.suppress(trio.RunFinishedError, IndexError):
            token[0].run_sync_soon(stop.set)
        thread.join()


def mesh_ca(running: Mesh, trust_domain: str = "cluster.local") -> TestCa:
    """The mesh's own root, key and all, so that a test can sign what the control plane never would."""
    with Store.open(running.directory / "state") as store:
        signer = store.signer()
    found = TestCa(trust_domain)
    assert isinstance(signer.key, ec.EllipticCurvePrivateKey)
    found.key = signer.key
    found.certificate = found.root = signer.certificate
    found.subject = signer.certificate.subject
    return found
