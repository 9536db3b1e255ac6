"""`python -m ztunnel.workers.starter`: forks workers for the daemon, whenever it asks.

A process with threads and an event loop must not fork, and one that is executed anew shares no memory with the
others. So the daemon executes this one: it loads the data path once, starts no thread and no loop, holds no secret,
and forks. Each worker is forked twice, so that it becomes the daemon's own child and outlives this process.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import traceback
from typing import TYPE_CHECKING

from hbone.daemon.late import UNUSED, import_late
from ztunnel.workers.process import call_ourselves, end_with, ignore_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ztunnel.workers.worker import Setup

__all__ = ["main"]

REQUEST_SIZE = 64


def main(argv: Sequence[str]) -> int:
    """Serve requests until the daemon closes the socket.

    Args:
        argv: descriptors of the socket, and of the file that holds the pickled `Setup`.
    """
    ignore_signals()
    call_ourselves("ztunnel-starter")
    import_late(*UNUSED)
    from ztunnel.workers import worker

    control = socket.socket(fileno=int(argv[0]))
    with os.fdopen(int(argv[1]), "rb") as file:
        setup: Setup = pickle.load(file)  # the daemon wrote it, and nobody else can
    try:
        end_with(setup.parent)
    except ProcessLookupError:
        return 1
    gc.collect()
    gc.freeze()  # a collection in a worker need not walk, and so copy, what all share
    while True:
        data, fds, _, _ = socket.recv_fds(control, REQUEST_SIZE, 2)
        if not data:
            return 0
        try:
            _fork(worker.main, setup, int(data), control, fds)
        except OSError as error:
            control.send(f"-{error.strerror}".encode())
        finally:
            for fd in fds:
                os.close(fd)


def _fork(
    work: Callable[[Setup, int, socket.socket, int], int],
    setup: Setup,
    number: int,
    control: socket.socket,
    fds: list[int],
) -> None:
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return
    code = 1
    try:
        child = os.fork()
        if child:
            control.send(str(child).encode())
            code = 0
        else:
            control.close()
            code = work(setup, number, socket.socket(fileno=fds[0]), fds[1])
    except OSError as error:
        control.send(f"-{error.strerror}".encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
