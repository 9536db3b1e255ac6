"""`hbone dev-ca | connect | listen | inspect`: tunnels for people at a shell."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbone.commandline import CommandError, ExitCode, Parser, run
from hbone.errors import ConnectionLost, ConnectRejected, HboneError, IdentityError, PeerIdentityError, TlsError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Sequence

    from hbone.connect import Authority
    from hbone.identity import FileSource, SpiffeId
    from hbone.trio import HboneStream

__all__ = ["build_parser", "main"]

HBONE_PORT = 15008
_INTERRUPTED = 130
_CHUNK = 65_536
_LONGEST_NAME = 200  # letters of a file's name, with room for its ending
_IDENTITY = (("cert", "HBONE_CERT"), ("key", "HBONE_KEY"), ("roots", "HBONE_ROOTS"))


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run("hbone", _main, argv)


def build_parser() -> Parser:
    """The command line, also for completion and documentation."""
    parser = Parser(
        prog="hbone",
        description="Many TCP connections in one mutual-TLS tunnel between two SPIFFE identities.",
        epilog="Example: hbone dev-ca /tmp/ca client server",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    dev_ca = _command(
        commands,
        "dev-ca",
        _dev_ca,
        "make a root and certificates to try things with",
        "NAME is NAMESPACE/ACCOUNT, an account of namespace 'default', or a SPIFFE ID; the files are called after its"
        " last part.\nA directory that has a root keeps it. Not for production: that is what miniistiod is for.",
        "hbone dev-ca /tmp/ca client shop/orders",
    )
    dev_ca.add_argument("directory", metavar="DIR", type=Path)
    dev_ca.add_argument("names", metavar="NAME", nargs="+")
    dev_ca.add_argument("--trust-domain", default=None, help="of a new root (default: cluster.local)")
    dev_ca.add_argument("--days", type=_days, default=7, help="how long they are valid, 1 to 90 (default: 7)")

    connect = _command(
        commands,
        "connect",
        _connect,
        "join standard input and output to a stream through a tunnel",
        "As nc: the end of standard input ends our direction, the other goes on. Without --peer any identity of our\n"
        "own trust domain may answer; who did is said on standard error.",
        "echo hello | hbone connect 10.0.0.7:8080 --via 10.0.0.7 --peer spiffe://cluster.local/ns/shop/sa/orders",
    )
    connect.add_argument("authority", metavar="AUTHORITY", help="host:port that the other end shall connect us to")
    connect.add_argument("--via", metavar="HOST[:PORT]", required=True, help="the tunnel's other end (port 15008)")
    connect.add_argument("--peer", metavar="SPIFFE_ID", help="who may answer there")
    connect.add_argument("--timeout", type=_seconds, default=10.0, help="seconds until the answer (default: 10)")
    _add_identity(connect)

    listen = _command(
        commands,
        "listen",
        _listen,
        "take tunnels, and connect their streams to one address",
        "Every stream of an allowed peer leads to --to, whatever authority it asks for. A PATTERN is a SPIFFE ID, or\n"
        "ends in /* for all below. SIGTERM or SIGINT ends it: peers are told by GOAWAY, and open streams have --drain\n"
        "seconds; a second signal ends it at once.",
        "hbone listen 15008 --to 127.0.0.1:8080 --allow 'spiffe://cluster.local/ns/shop/*'",
    )
    listen.add_argument("port", metavar="PORT", type=_port, help="0 lets the system choose")
    listen.add_argument("--to", metavar="HOST:PORT", required=True, help="where streams are connected to")
    listen.add_argument("--allow", metavar="PATTERN", action="append", required=True, help="who may come; repeatable")
    listen.add_argument("--host", help="address to listen on (default: every one)")
    listen.add_argument("--drain", type=_seconds, default=5.0, help="seconds for open streams at the end (default: 5)")
    _add_identity(listen)

    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "show who answers at an address",
        "Without a certificate: what the server shows to everybody, unverified. With one: whether it is verified, and\n"
        "its SETTINGS; exit 1 when it is not.",
        "hbone inspect 10.0.0.7 --json",
    )
    inspect.add_argument("address", metavar="HOST[:PORT]")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.add_argument("--timeout", type=_seconds, default=10.0, help="seconds for each connection (default: 10)")
    _add_identity(inspect)
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], title: str, text: str, example: str
) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=title,
        description=f"{title[0].upper()}{title[1:]}.\n{text}",
        epilog=f"Example: {example}",
    )
    parser.set_defaults(function=function)
    return parser


def _add_identity(parser: Parser) -> None:
    parser.add_argument("--cert", metavar="FILE", help="our certificate, then intermediates (or HBONE_CERT)")
    parser.add_argument("--key", metavar="FILE", help="its private key (or HBONE_KEY)")
    parser.add_argument("--roots", metavar="FILE", help="roots of our trust domain (or HBONE_ROOTS)")


def _main(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        result: int = arguments.function(arguments)
    except CommandError:
        raise
    except HboneError as error:
        raise _as_answer(error) from error
    return result


# Arguments


def _days(text: str) -> int:
    return _number(text, 1, 90, "days")


def _port(text: str) -> int:
    return _number(text, 0, 65_535, "port")


def _number(text: str, low: int, high: int, what: str) -> int:
    import argparse

    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{what} is {text!r}; it must be a number from {low} to {high}")
    return int(text)


def _seconds(text: str) -> float:
    import argparse

    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.001 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"timeout is {text!r}; it must be seconds from 0.001 to 86400")
    return value


def _address(text: str, default_port: int | None) -> tuple[str, int]:
    """HOST, HOST:PORT, an IPv6 address, or one in brackets with a port."""
    host, port = text, ""
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            port = rest[1:] if bracket and rest.startswith(":") else rest or ("" if bracket else "?")
        else:
            host, _, port = text.partition(":")
    if not port and default_port is not None:
        port = str(default_port)
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65_535:
        form = "HOST:PORT" if default_port is None else "HOST or HOST:PORT"
        raise CommandError(f"address {text!r} is malformed; write {form} with a port from 1 to 65535, IPv6 in brackets")
    return host, int(port)


def _source(arguments: argparse.Namespace, *, needed: bool) -> FileSource | None:
    """Our identity from the options or the environment.

    Raises:
        CommandError: it is needed and not given, or given in part.
    """
    values = {name: getattr(arguments, name) or os.environ.get(variable) for name, variable in _IDENTITY}
    missing = [f"--{name} (or {variable})" for name, variable in _IDENTITY if not values[name]]
    if missing and (needed or len(missing) < len(_IDENTITY)):
        raise CommandError(f"our identity is incomplete; give {', '.join(missing)}")
    if missing:
        return None
    from hbone.identity import FileSource

    return FileSource(cert=str(values["cert"]), key=str(values["key"]), roots=str(values["roots"]))


def _as_answer(error: HboneError) -> CommandError:
    """An error of the library as the command's end."""
    if isinstance(error, ConnectionLost) and isinstance(error.__cause__, TlsError):
        error = error.__cause__
    if isinstance(error, ConnectRejected):
        return CommandError(f"the other end answered CONNECT with status {error.status}", ExitCode.NO)
    if isinstance(error, PeerIdentityError) or (isinstance(error, TlsError) and "our certificate" in str(error)):
        return CommandError(str(error), ExitCode.NO)
    if isinstance(error, IdentityError) or not isinstance(error, (TlsError, ConnectionLost)):
        return CommandError(str(error))
    return CommandError(str(error), ExitCode.UNREACHABLE)


def _run(function: Callable[..., Awaitable[int]], *arguments: Any) -> int:
    """Run under Trio; what leaves it leaves without a group around it."""
    import trio

    try:
        # At a checkpoint only: elsewhere Ctrl-C would leave coroutines behind, of which Python then warns.
        return trio.run(function, *arguments, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        for leaf in leaves:
            if isinstance(leaf, KeyboardInterrupt):
                raise KeyboardInterrupt from None
        if all(isinstance(leaf, (HboneError, OSError)) for leaf in leaves):
            raise leaves[0] from None
        raise


def _leaves(group: BaseExceptionGroup[BaseException]) -> Any:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _say(text: str) -> None:
    print(f"hbone: {text}", file=sys.stderr, flush=True)


# dev-ca


def _dev_ca(arguments: argparse.Namespace) -> int:
    from hbone.daemon.files import write_private
    from hbone.devca import DevCa, spiffe_id_of

    directory: Path = arguments.directory
    lifetime = datetime.timedelta(days=arguments.days)
    root_cert, root_key = directory / "root.pem", directory / "root.key"
    try:
        if root_cert.exists() or root_key.exists():
            ca = DevCa.load(root_cert.read_bytes(), root_key.read_bytes())
            if arguments.trust_domain not in (None, ca.trust_domain):
                raise CommandError(
                    f"{root_cert} is the root of {ca.trust_domain}, not of {arguments.trust_domain};"
                    " name another directory"
                )
        else:
            domain = "cluster.local" if arguments.trust_domain is None else arguments.trust_domain
            ca = DevCa.create(domain, lifetime)
        identities = {}
        for name in arguments.names:
            spiffe_id = spiffe_id_of(name, ca.trust_domain)
            stem = spiffe_id.path.rsplit("/", 1)[-1]
            if len(stem) > _LONGEST_NAME:
                raise CommandError(f"the name {stem[:40]}... has {len(stem)} letters; a file's has {_LONGEST_NAME}")
            if stem == "root" or stem in identities or (directory / f"{stem}.pem").exists():
                raise CommandError(f"{directory / stem}.pem would be written over; remove it or choose another name")
            identities[stem] = spiffe_id
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        certificate, key = ca.to_pem()
        write_private(root_cert, certificate, 0o644)
        write_private(root_key, key)
        print(f"{root_cert}  root of {ca.trust_domain}, for trying things only")
        for stem, spiffe_id in identities.items():
            certificate, key = ca.issue(spiffe_id, lifetime)
            write_private(directory / f"{stem}.key", key)
            write_private(directory / f"{stem}.pem", certificate, 0o644)
            print(f"{directory / stem}.pem  {spiffe_id}")
    except OSError as error:
        where = error.filename or directory
        raise CommandError(f"{where} cannot be used: {(error.strerror or str(error)).lower()}") from None
    first = next(iter(identities))
    print(f"export HBONE_CERT={directory}/{first}.pem HBONE_KEY={directory}/{first}.key HBONE_ROOTS={root_cert}")
    return ExitCode.DONE


# connect


def _connect(arguments: argparse.Namespace) -> int:
    from hbone.connect import Authority
    from hbone.identity import SpiffeId

    try:
        authority = Authority.parse(arguments.authority)
    except HboneError as error:
        raise CommandError(f"AUTHORITY {arguments.authority!r}: {error}") from None
    via = _address(arguments.via, HBONE_PORT)
    try:
        peer = None if arguments.peer is None else SpiffeId.parse(arguments.peer)
    except HboneError as error:
        raise CommandError(f"--peer {arguments.peer!r}: {error}; write a SPIFFE ID") from None
    source = _source(arguments, needed=True)
    return _run(_connect_stream, source, authority, via, peer, arguments.timeout)


async def _connect_stream(
    source: FileSource, authority: Authority, via: tuple[str, int], peer: SpiffeId | None, timeout: float
) -> int:
    import trio

    import hbone.trio

    async with hbone.trio.ConnectionPool(source, dial_timeout=timeout) as pool:
        stream: HboneStream | None = None
        with trio.move_on_after(timeout):
            stream = await pool.connect(authority, via=via, peer=peer)
        if stream is None:
            raise CommandError(f"{authority} did not answer within {timeout:g} s", ExitCode.UNREACHABLE)
        if peer is None:
            _say(f"connected with {stream.peer}")
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(_send_input, stream)
            try:
                async for data in stream:
                    await trio.to_thread.run_sync(_write_output, data, abandon_on_cancel=True)
            except trio.BrokenResourceError as error:
                raise CommandError(f"the connection broke: {error}", ExitCode.UNREACHABLE) from None
            except BrokenPipeError:
                stream.reset()
            nursery.cancel_scope.cancel()
    return ExitCode.DONE


async def _send_input(stream: HboneStream) -> None:
    import trio

    try:
        while data := await trio.to_thread.run_sync(os.read, 0, _CHUNK, abandon_on_cancel=True):
            await stream.send_all(data)
        await stream.send_eof()
    except trio.BrokenResourceError:
        pass  # it reads no more; what it still sends is shown


def _write_output(data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


# listen


def _listen(arguments: argparse.Namespace) -> int:
    from hbone.identity import allow

    target = _address(arguments.to, None)
    try:
        authorize = allow(*arguments.allow)
    except HboneError as error:
        raise CommandError(f"--allow: {error}; write SPIFFE IDs, or patterns that end in /*") from None
    source = _source(arguments, needed=True)
    try:
        return _run(_serve, source, arguments.port, arguments.host, target, authorize, arguments.drain)
    except OSError as error:
        where = f"{arguments.host or '*'}:{arguments.port}"
        raise CommandError(f"cannot listen on {where}: {(error.strerror or str(error)).lower()}") from None


async def _serve(
    source: FileSource, port: int, host: str | None, target: tuple[str, int], authorize: Any, drain: float
) -> int:
    import logging

    import trio

    import hbone.trio
    from hbone.trio.client import open_tcp
    from hbone.trio.relay import relay

    logging.basicConfig(format="hbone: %(message)s", level=logging.WARNING)
    logging.getLogger("hbone").setLevel(logging.INFO)

    async def handler(stream: HboneStream) -> None:
        try:
            with trio.fail_after(10):
                tcp = await open_tcp(*target)
        except (ConnectionLost, trio.TooSlowError) as error:
            _say(f"{stream.peer} to {stream.request.authority}: 503, {error or 'no answer within 10 s'}")
            stream.reject(503)
            return
        assert isinstance(tcp, trio.SocketStream)
        stream.accept()
        _say(f"{stream.peer} to {stream.request.authority}: connected")
        await relay(stream, tcp)

    serving = trio.CancelScope()
    code = int(ExitCode.DONE)

    async def serve(task_status: trio.TaskStatus[Any]) -> None:
        with serving:
            await hbone.trio.serve(
                handler, source, port, host=host, authorize=authorize, drain_timeout=drain, task_status=task_status
            )
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            listeners = await nursery.start(serve)
            bound = listeners[0].socket.getsockname()
            _say(f"listening on {bound[0]}:{bound[1]} as {source.current().id}, to {target[0]}:{target[1]}")
            async for number in signals:
                if serving.cancel_called:
                    os._exit(128 + number)
                if number == signal.SIGINT:
                    code = _INTERRUPTED
                _say(f"{signal.Signals(number).name}: no new streams; open ones have {drain:g} s")
                serving.cancel()  # the server drains
    return code


# inspect


def _inspect(arguments: argparse.Namespace) -> int:
    address = _address(arguments.address, HBONE_PORT)
    source = _source(arguments, needed=False)
    return _run(_show, address, source, arguments.timeout, arguments.json)


async def _show(address: tuple[str, int], source: FileSource | None, timeout: float, as_json: bool) -> int:
    from hbone.inspect import report_of, told
    from hbone.trio.inspect import look_at, settings_of

    presented = await look_at(address, timeout)
    problem: str | None = None
    settings: dict[str, int] | None = None
    verified: bool | None = None
    if source is not None:
        try:
            settings = await settings_of(address, source.current(), timeout)
            verified = True
        except HboneError as error:
            problem = str(error)
            verified = False
    report = report_of(address, presented, verified, problem, settings)
    print(json.dumps(report, indent=2) if as_json else "\n".join(told(report)))
    return ExitCode.NO if verified is False else ExitCode.DONE
