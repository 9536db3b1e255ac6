"""The `ztunnel` command: run, status, explain, enroll, version."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from hbone import commandline
from hbone.commandline import CommandError, ExitCode, Parser
from hbone.connect import Authority, AuthorityError
from hbone.daemon import logs
from hbone.daemon.late import tidy
from hbone.errors import ConfigurationError
from hbone.version import VERSION
from ztunnel.config import DEFAULT_ROOT, DEFAULT_STATE_DIR, Config
from ztunnel.control.cache import StateDir
from ztunnel.control.enroll import enroll, settings
from ztunnel.control.transport import ControlPlaneError, RootSource, ServerAddress, TokenSource, Unreachable
from ztunnel.given import from_systemd
from ztunnel.logscopes import read_levels
from ztunnel.standing import timestamp
from ztunnel.takeover import TakeOverFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return commandline.run("ztunnel", _main, argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.command(arguments))
    except Unreachable as error:
        raise CommandError(str(error), ExitCode.UNREACHABLE) from None
    except ControlPlaneError as error:
        raise CommandError(str(error), ExitCode.NO) from None


def _parser() -> Parser:
    parser = Parser(
        prog="ztunnel",
        description="The node proxy of an ambient mesh. Settings are environment variables, with Istio's names.",
        epilog="example:\n  PROXY_WORKLOAD_INFO=shop/web-1/web XDS_ADDRESS=https://10.0.0.1:15012"
        " CA_ADDRESS=https://10.0.0.1:15012 ztunnel run",
    )
    parser.set_defaults(command=_run, take_over=False, background=False, ready_fd=None)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name in ("run", "proxy"):
        run = commands.add_parser(
            name,
            help="run the proxy until SIGTERM (the default)" if name == "run" else "the same, as ztunnel calls it",
            description="Run the proxy. SIGTERM or SIGINT drains it, a second SIGINT ends it at once."
            " With --take-over it gets the sockets of the one that runs on the same state directory as soon as it is"
            " ready itself, so that no connection is refused; that one serves what it has, drains and ends.",
            epilog=f"example:\n  PROXY_WORKLOAD_INFO=shop/web-1/web ztunnel {name}\n"
            f"  ztunnel {name} --take-over --background",
        )
        run.add_argument(
            "--take-over", action="store_true", help="replace the ztunnel that runs; where none runs, start as usual"
        )
        run.add_argument(
            "--background", action="store_true", help="return as soon as it serves, with 0, or when it failed"
        )
        run.add_argument("--ready-fd", type=int, metavar="FD", help=argparse.SUPPRESS)
        run.set_defaults(command=_run)
    status = commands.add_parser(
        "status",
        help="what the proxy on this host does",
        description="Identity and its expiry, the control plane, tunnels and connections of the proxy on this host,"
        " and the ports of this host that can be reached past the mesh.",
        epilog="example:\n  ztunnel status --json",
    )
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(command=_status)
    explain = commands.add_parser(
        "explain",
        help="what the mesh does with a connection",
        description="Every step of the decision: service, endpoint, tunnel or plaintext, expected peer, policy."
        " Exit code 1 when the connection would be refused.",
        epilog="example:\n  ztunnel explain orders.shop.internal:8080 --from shop/web-1",
    )
    explain.add_argument("destination", metavar="HOST:PORT", help="where to: an address, or a name")
    explain.add_argument(
        "--from", dest="source", metavar="WORKLOAD", help="the client: namespace/name or uid; default the workload here"
    )
    explain.add_argument("--json", action="store_true", help="for programs")
    explain.set_defaults(command=_explain)
    enrol = commands.add_parser(
        "enroll",
        help="turn a one-time token into this host's certificate",
        description="Present a one-time token to the control plane and keep the certificate it gives. The token leaves"
        " this host only after the server's chain was found to end in the root that the token names. SECRET_TTL,"
        " PACKET_MARK, ZTUNNEL_BIND_ADDRESS and ZTUNNEL_STATE_DIR count as for run.",
        epilog="example:\n  ztunnel enroll --server 10.0.0.1 --token-file token.txt",
    )
    enrol.add_argument("--server", required=True, metavar="HOST[:15012]", help="the control plane")
    enrol.add_argument("--token-file", required=True, metavar="FILE", help="the token; - for standard input")
    enrol.add_argument("--name", help="name of this host's workload, where the token names none; default the host name")
    enrol.set_defaults(command=_enroll)
    about = commands.add_parser(
        "version", help="the version", description="Print the version.", epilog="example:\n  ztunnel version"
    )
    about.set_defaults(command=_version)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    config = settings(os.environ)
    config.served  # noqa: B018 - a missing workload is named now, before anything starts
    _check_files(config)
    if arguments.background:
        return _run_behind(arguments)
    given = from_systemd(os.environ)
    terminal = sys.stdout.isatty()
    format_ = config.log_format if config.log_format != "auto" else "console" if terminal else "json"
    levels, _ = read_levels(config.log_level)
    logs.configure(format_, levels)  # type: ignore[arg-type]  # the settings allow these names only
    state = _state(config, join=arguments.take_over)
    tidy()
    from ztunnel import app

    def tell() -> None:
        if arguments.ready_fd is not None:
            with contextlib.suppress(OSError):  # who waited for it is gone
                os.write(arguments.ready_fd, b"serving\n")
                os.close(arguments.ready_fd)

    try:
        app.run(config, state, given=given, take_over=arguments.take_over, when_serving=tell)
    except TakeOverFailed as error:
        raise CommandError(str(error), ExitCode.UNREACHABLE) from None
    finally:
        given.close()
        if state is not None:
            state.release()
    return ExitCode.DONE


def _run_behind(arguments: argparse.Namespace) -> int:
    """Start the daemon in a session of its own, and wait until it serves or ends."""
    reading, writing = os.pipe()
    command = [sys.executable, "-I" if sys.flags.isolated else "-P", "-m", "ztunnel", "run", "--ready-fd", str(writing)]
    if arguments.take_over:
        command.append("--take-over")
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[writing], start_new_session=True)
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb") as ready:
        told = ready.read()  # until it says so, or ends
    if told:
        print(f"ztunnel serves, process {child.pid}")
        return ExitCode.DONE
    return child.wait() or ExitCode.UNREACHABLE


def _check_files(config: Config) -> None:
    """Read once what the settings name, so that a wrong path is told now; later a file may come and go.

    Raises:
        ConfigurationError: a file of roots, or the token, cannot be used.
    """
    for variable, setting in (("CA_ROOT_CA", config.ca_root_ca), ("XDS_ROOT_CA", config.xds_root_ca)):
        if setting == DEFAULT_ROOT or (variable == "XDS_ROOT_CA" and not config.xds_address):
            continue
        try:
            RootSource(setting, default=Path(DEFAULT_ROOT), variable=variable).load()
        except ControlPlaneError as error:
            raise ConfigurationError(f"{variable} cannot be used: {error}") from None
    token = config.auth_token
    if not token:
        return
    try:
        if token.startswith(("/", "./", "../")):  # no token begins like that
            TokenSource(path=Path(token)).read()
        else:
            source = TokenSource.from_setting(token, Path())
            if source is not None:
                source.read()
    except ControlPlaneError as error:
        raise ConfigurationError(f"AUTH_TOKEN cannot be used: {error}") from None


def _state(config: Config, *, join: bool = False) -> StateDir | None:
    """The state directory: the one that was named, or the usual one where it can be had."""
    open_ = StateDir.join if join else StateDir.open
    if join or config.state_dir is not None:
        return open_(config.state_dir or DEFAULT_STATE_DIR)
    try:
        return open_(DEFAULT_STATE_DIR)
    except ConfigurationError as error:
        logs.get_logger("ztunnel.app").warning(
            "nothing is kept on disk: a restart while the control plane is away cannot serve; set ZTUNNEL_STATE_DIR",
            error=str(error),
        )
        return None


def _daemon(path: str) -> tuple[int, Any]:
    """Ask the daemon of these settings, by its socket or else its port; what it answered, JSON where it is 200.

    Raises:
        CommandError: no daemon answers, or not with a page of ours.
    """
    from ztunnel.client import DaemonAway, ask

    config = settings(os.environ)
    socket_path = StateDir(config.state_dir or DEFAULT_STATE_DIR).admin_socket
    try:
        code, body = ask(path, socket_path=socket_path, host=config.loopback_host, port=config.admin_port)
        return code, json.loads(body) if code == 200 else body.decode(errors="replace").strip()
    except DaemonAway as error:
        raise CommandError(f"{error}; is ztunnel running, with the same settings?", ExitCode.UNREACHABLE) from None
    except ValueError:
        raise CommandError("what answers is no ztunnel", ExitCode.UNREACHABLE) from None


def _status(arguments: argparse.Namespace) -> int:
    code, found = _daemon("/status")
    if code != 200 or not isinstance(found, dict):
        raise CommandError(f"the daemon answered {code}: {found}", ExitCode.UNREACHABLE)
    from ztunnel import reach
    from ztunnel.statustext import status_lines

    found["reach"] = reach.look(found)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(status_lines(found, time.time())))
    return ExitCode.DONE


def _explain(arguments: argparse.Namespace) -> int:
    try:
        Authority.parse(arguments.destination)
    except AuthorityError as error:
        raise CommandError(f"destination {arguments.destination!r}: {error}; write HOST:PORT") from None
    query = {"destination": arguments.destination} | ({"from": arguments.source} if arguments.source else {})
    code, found = _daemon("/explain?" + _encode(query))
    if code != 200 or not isinstance(found, dict):
        raise CommandError(str(found))
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for step in found["steps"]:
            print(f"{step['topic']:12} {step['text']}")
        print("allowed" if found["allowed"] else "refused")
    return ExitCode.DONE if found["allowed"] else ExitCode.NO


def _encode(query: Mapping[str, str]) -> str:
    from urllib.parse import urlencode

    return urlencode(query)


def _enroll(arguments: argparse.Namespace) -> int:
    from ztunnel.wire.token import parse_enrolment_token

    address = ServerAddress.parse(arguments.server, variable="--server")
    token = parse_enrolment_token(_read_token(arguments.token_file))
    if arguments.name and token.name and arguments.name != token.name:
        raise CommandError(f"--name is {arguments.name!r}, but the token is for {token.name!r}; leave --name out")
    name = token.name or arguments.name or socket.gethostname().partition(".")[0]
    if not name or "/" in name or len(name) > 253:
        raise CommandError(f"--name is {name!r}; it must be the name of a workload, without a slash")
    config = Config.from_env(os.environ)
    state = StateDir.open(config.state_dir or DEFAULT_STATE_DIR)
    try:
        identity, offset = trio.run(_enroll_now, address, token, state, name, config)
    finally:
        state.release()
    expires = timestamp(identity.svid.expires_at.timestamp())
    print(f"{identity.svid.id} until {expires}, kept in {state.path}")
    print(_clock_text(offset))
    print(f"start it with: {_start_hint(config)}ztunnel run")
    return ExitCode.DONE


async def _enroll_now(address: ServerAddress, token: Any, state: StateDir, name: str, config: Config) -> Any:
    return await enroll(
        address,
        token,
        state,
        name=name,
        lifetime=config.secret_ttl,
        mark=config.packet_mark,
        source=config.bind_address,
    )


def _start_hint(config: Config) -> str:
    return f"ZTUNNEL_STATE_DIR={config.state_dir} " if config.state_dir is not None else ""


def _clock_text(offset: float) -> str:
    seconds = abs(round(offset))
    if seconds <= 2:
        return "this host's clock agrees with the control plane's within 2 seconds"
    way = "ahead of" if offset > 0 else "behind"
    text = f"this host's clock is {seconds} s {way} the control plane's"
    return text if seconds < 60 else f"{text}; set it, or certificates will not be valid here when they are there"


def _read_token(path: str) -> str:
    from ztunnel.wire.token import MAX_TOKEN_LENGTH

    try:
        if path == "-":
            raw = sys.stdin.buffer.read(MAX_TOKEN_LENGTH + 1)
        else:
            with Path(path).open("rb") as file:
                raw = file.read(MAX_TOKEN_LENGTH + 1)
    except OSError as error:
        raise CommandError(f"the token file {path!r} cannot be read: {error.strerror}") from None
    return raw.decode("latin-1")


def _version(_: argparse.Namespace) -> int:
    print(f"ztunnel {VERSION}")
    return ExitCode.DONE
