"""`miniistiod run | init | version`, and the commands of the modules beside this one."""

from __future__ import annotations

import datetime
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from hbone.commandline import CommandError, ExitCode, Parser, run
from hbone.config import parse_duration
from hbone.daemon import logs
from hbone.version import VERSION
from miniistiod import commands_authority, commands_mesh, commands_tokens, watch
from miniistiod.ca import DEFAULT_LIFETIME, fingerprint
from miniistiod.commandline import PROGRAM, add_command, add_state, example
from miniistiod.config import Config, parse_address
from miniistiod.plugged import new_state
from miniistiod.store import DATABASE, ROOT_FILE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run(PROGRAM, _dispatch, argv)


def _dispatch(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    return int(arguments.command(arguments))


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog=PROGRAM,
        description="Identity authority and control plane of an ambient mesh without Kubernetes.",
        epilog=example(
            "miniistiod run --config mesh/ --state /var/lib/miniistiod --init",
            "miniistiod check mesh/",
            "miniistiod token create --state /var/lib/miniistiod --namespace shop --service-account orders",
        ),
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    _add_init(commands)
    commands_mesh.add(commands)
    commands_tokens.add(commands)
    commands_authority.add(commands)
    version = commands.add_parser("version", help="print the version", epilog=example("miniistiod version"))
    version.set_defaults(command=_version)
    return top


def _add_run(commands: Any) -> None:
    command = add_command(
        commands,
        "run",
        "serve a mesh: certificates and discovery for its ztunnels",
        _run,
        "miniistiod run --config mesh/ --state /var/lib/miniistiod --init",
        "miniistiod run --config mesh/ --state state/ --listen 10.0.0.1:15012 --name mesh.example.com",
    )
    command.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of YAML documents and meshconfig.yaml, watched",
    )
    add_state(command)
    command.add_argument("--init", action="store_true", help="make the state and a new root if there is none")
    command.add_argument("--trust-domain", metavar="TD", help="with --init: the mesh's trust domain (cluster.local)")
    _add_ca_directory(command)
    command.add_argument(
        "--issuers", type=Path, metavar="FILE", help="issuers whose tokens (OIDC) are believed, and for whom; YAML"
    )
    command.add_argument(
        "--listen", default="0.0.0.0:15012", metavar="ADDR[:PORT]", help="discovery and CA over TLS (0.0.0.0:15012)"
    )
    command.add_argument(
        "--monitoring", default="127.0.0.1:15014", metavar="ADDR[:PORT]", help="metrics, readiness (127.0.0.1:15014)"
    )
    command.add_argument(
        "--name", action="append", default=[], metavar="HOST", help="a name or address that hosts dial; may be repeated"
    )
    command.add_argument("--default-ttl", metavar="TIME", help="lifetime of a certificate (24h)")
    command.add_argument("--max-ttl", default="90d", metavar="TIME", help="more than this is refused (90d)")
    command.add_argument(
        "--registration-grace", default="10s", metavar="TIME", help="how long a registered machine may be away (10s)"
    )
    command.add_argument("--log-format", choices=("plain", "json", "console"), help="console on a terminal, else plain")
    command.add_argument("--log-level", default="info", choices=("trace", "debug", "info", "warn", "error", "off"))


def _add_ca_directory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ca-dir",
        type=Path,
        metavar="DIR",
        help="a CA of yours: ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem; else a root of its own",
    )


def _run(arguments: argparse.Namespace) -> int:
    longest = _lifetime(arguments.max_ttl)
    usual = DEFAULT_LIFETIME if arguments.default_ttl is None else _lifetime(arguments.default_ttl)
    if arguments.default_ttl is not None and usual > longest:
        raise CommandError(
            f"--default-ttl is {arguments.default_ttl}, over the --max-ttl of {arguments.max_ttl}; lower the one or"
            " raise the other"
        )
    config = Config(
        config_dir=arguments.config,
        state_dir=arguments.state,
        init=arguments.init,
        trust_domain=arguments.trust_domain,
        ca_dir=arguments.ca_dir,
        issuers=arguments.issuers,
        listen=parse_address(arguments.listen, 15012),
        monitoring=parse_address(arguments.monitoring, 15014),
        names=tuple(arguments.name),
        default_lifetime=usual,
        max_lifetime=longest,
        registration_grace=_lifetime(arguments.registration_grace),
    )
    if not (config.state_dir / DATABASE).exists():
        watch.scan(config.config_dir)  # a wrong path is told at once, and no root is made for it
    logs.configure(arguments.log_format or ("console" if sys.stdout.isatty() else "plain"), arguments.log_level)
    try:
        trio.run(_serve, config)
    finally:
        logs.shutdown()
    return ExitCode.DONE


async def _serve(config: Config) -> None:
    from miniistiod.app import MiniIstiod  # servers and metrics: other commands start faster without

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with MiniIstiod(config):
            async for number in signals:
                logs.get_logger("miniistiod.app").info("stopping", signal=signal.Signals(number).name)
                return


def _lifetime(text: str) -> datetime.timedelta:
    return datetime.timedelta(seconds=parse_duration(text))


def _add_init(commands: Any) -> None:
    command = add_command(
        commands,
        "init",
        "make the state of a new mesh: its root, ten years, P-256",
        _init,
        "miniistiod init --state /var/lib/miniistiod --trust-domain mesh.example.com",
        "miniistiod init --state /var/lib/miniistiod --ca-dir /etc/miniistiod/ca",
    )
    add_state(command)
    command.add_argument("--trust-domain", default="cluster.local", metavar="TD", help="(cluster.local)")
    _add_ca_directory(command)


def _init(arguments: argparse.Namespace) -> int:
    with new_state(arguments.state, arguments.trust_domain, arguments.ca_dir) as store:
        root = store.server_root()
        print(f"trust domain  {store.trust_domain}")
        print(f"root          {arguments.state / ROOT_FILE}")
        print(f"root SHA-256  {fingerprint(root)}")
        print(f"valid until   {root.not_valid_after_utc:%Y-%m-%d}")
    return ExitCode.DONE


def _version(arguments: argparse.Namespace) -> int:
    del arguments
    print(f"{PROGRAM} {VERSION}")
    return ExitCode.DONE
