"""An echo over HBONE with Trio: a server and a client that know each other by identity.

    python -m examples.echo

Both ends run in this one program here; in life they are two programs on two machines, and `via` is the other's
address. The certificates are made in memory by the test CA; `hbone dev-ca DIR server client` makes such files, and
`hbone.FileSource(cert=..., key=..., roots=...)` reads them and follows their changes.
"""

from __future__ import annotations

import trio

import hbone
import hbone.trio
from hbone.testing.ca import TestCa

CA = TestCa()


def identity(name: str) -> hbone.StaticSource:
    """What a program holds: its certificate and key, and the roots that it trusts."""
    made = CA.identity("demo", name)
    return hbone.StaticSource(made.svid, made.bundles)


async def handler(stream: hbone.trio.HboneStream) -> None:
    """Serve one connection: bytes come back until the client ends its direction."""
    print(f"server: {stream.peer} asks for {stream.request.authority}")
    async with stream:
        async for data in stream:
            await stream.send_all(data)
        await stream.send_eof()


async def main() -> None:
    """Serve, call, and stop."""
    only_the_client = hbone.allow(CA.id("demo", "client"))
    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
            await hbone.trio.serve(
                handler,
                identity("server"),
                host="127.0.0.1",
                port=0,
                authorize=only_the_client,
                task_status=task_status,
            )

        listeners = await nursery.start(serve)
        port = listeners[0].socket.getsockname()[1]
        async with hbone.trio.ConnectionPool(identity("client")) as pool:
            peer = str(CA.id("demo", "server"))
            async with await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=peer) as stream:
                print(f"client: talking to {stream.peer}")
                await stream.send_all(b"hello over HBONE\n")
                await stream.send_eof()
                answer = b"".join([part async for part in stream])
                print(f"client: {answer.decode().strip()!r} came back")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
