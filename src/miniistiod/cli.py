"""`miniistiod run | init | check | get | version`, and the commands of the modules beside this one."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from hbone.commandline import CommandError, ExitCode, Parser, run
from hbone.config import parse_duration
from hbone.daemon import logs
from hbone.errors import ConfigurationError
from miniistiod import admin_client, commands_authority, commands_tokens, expiry, lint, watch
from miniistiod.ca import DEFAULT_LIFETIME
from miniistiod.commandline import PROGRAM, add_command, add_state, example, table, when
from miniistiod.config import Config, parse_address
from miniistiod.registry import Registry
from miniistiod.resources import Severity, load
from miniistiod.store import ADMIN_SOCKET, DATABASE, ROOT_FILE, Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from miniistiod.resources import Finding

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
    _add_check(commands)
    commands_tokens.add(commands)
    commands_authority.add(commands)
    _add_get(commands)
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
    command.add_argument(
        "--ca-dir",
        type=Path,
        metavar="DIR",
        help="a CA of yours: ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem; else a root of its own",
    )
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
    )
    add_state(command)
    command.add_argument("--trust-domain", default="cluster.local", metavar="TD", help="(cluster.local)")


def _init(arguments: argparse.Namespace) -> int:
    with Store.create(arguments.state, arguments.trust_domain, datetime.datetime.now(datetime.UTC)) as store:
        signer = store.signer()
        print(f"trust domain  {store.trust_domain}")
        print(f"root          {arguments.state / ROOT_FILE}")
        print(f"root SHA-256  {signer.sha256.hex()}")
        print(f"valid until   {signer.certificate.not_valid_after_utc:%Y-%m-%d}")
    return ExitCode.DONE


# -- check


def _add_check(commands: Any) -> None:
    command = add_command(
        commands,
        "check",
        "say what is wrong with documents before they are loaded: file, line, what, how to mend it",
        _check,
        "miniistiod check mesh/",
        "miniistiod check mesh/shop.yaml mesh/meshconfig.yaml --strict",
    )
    command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a directory, or YAML files")
    command.add_argument("--strict", action="store_true", help="exit 1 for warnings too")
    command.add_argument("--json", action="store_true", help="findings as JSON")


def _check(arguments: argparse.Namespace) -> int:
    files: dict[str, str] = {}
    for path in arguments.paths:
        if path.is_dir():
            files.update({str(path / name): text for name, text in watch.read(path).items()})
        else:
            files[str(path)] = _text(path)
    resources = load(files)
    findings: list[Finding] = list(resources.findings)
    if not resources.errors:
        findings += lint.findings(Registry.of(resources), resources.mesh.trust_domain)
    errors = sum(item.severity is Severity.ERROR for item in findings)
    if arguments.json:
        print(json.dumps([item.to_json() for item in findings], indent=1))
    else:
        for item in findings:
            print(item)
        kinds = f"{len(resources.resources)} documents, {errors} errors, {len(findings) - errors} warnings"
        print(kinds, file=sys.stderr)
    return ExitCode.NO if errors or (arguments.strict and findings) else ExitCode.DONE


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{str(path)!r} cannot be read: {(error.strerror or '').lower()}; check the path") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{str(path)!r} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


# -- get


def _add_get(commands: Any) -> None:
    command = add_command(
        commands,
        "get",
        "show what a running control plane knows and has issued",
        _get,
        "miniistiod get workloads --state state/",
        "miniistiod get certificates --state state/ --json",
    )
    command.add_argument("what", choices=tuple(_COLUMNS))
    add_state(command)
    command.add_argument("--json", action="store_true")


def _get(arguments: argparse.Namespace) -> int:
    socket = arguments.state / ADMIN_SOCKET
    items = admin_client.fetch(socket, f"/{arguments.what}")
    if arguments.json:
        print(json.dumps(items, indent=1))
        return ExitCode.DONE
    header, row = _COLUMNS[arguments.what]
    table(header, [row(item) for item in items])
    status = admin_client.fetch(socket, "/ready")
    for problem in status["problems"]:
        print(f"{PROGRAM}: not in force: {problem}", file=sys.stderr)
    _warn(arguments.state)
    return ExitCode.DONE


def _warn(state: Path) -> None:
    with contextlib.suppress(ConfigurationError), Store.open(state) as store:
        for text in expiry.warnings(store, time.time()):
            print(f"{PROGRAM}: {text}", file=sys.stderr)


def _workload(item: dict[str, Any]) -> tuple[str, ...]:
    body = item["workload"]
    at = ",".join(alias.partition("/")[2] for alias in item["at"]) or body.get("hostname", "-")
    return (
        f"{body['namespace']}/{body['name']}",
        at,
        body.get("serviceAccount", "default"),
        body.get("tunnelProtocol", "plaintext"),
        ",".join(sorted(body.get("services", {}))) or "-",
        ",".join(body.get("authorizationPolicies", ())) or "-",
    )


def _service(item: dict[str, Any]) -> tuple[str, ...]:
    body = item["service"]
    ports = ",".join(f"{port['servicePort']}->{port.get('targetPort', '?')}" for port in body.get("ports", ()))
    return item["name"], ",".join(alias.partition("/")[2] for alias in item["at"]) or "-", ports or "-"


def _policy(item: dict[str, Any]) -> tuple[str, ...]:
    body = item["policy"]
    return item["name"], body.get("action", "ALLOW"), body.get("scope", "GLOBAL"), str(len(body.get("rules", ())))


def _certificate(item: dict[str, Any]) -> tuple[str, ...]:
    return (
        item["serial"],
        item["spiffe_id"],
        when(item["issued"]),
        when(item["expires"]),
        "revoked" if item["revoked"] else "valid",
        item["caller"],
    )


def _registration(item: dict[str, Any]) -> tuple[str, ...]:
    since = item["connected"] if item["state"] == "connected" else item["disconnected"] or item["connected"]
    name = f"{item['namespace']}/{item['name']}"
    return name, item["group"], item["address"], item["service_account"], item["state"], when(since)


def _subscriber(item: dict[str, Any]) -> tuple[str, ...]:
    rejected = [kind["rejected"] for kind in item["types"].values() if kind["rejected"]]
    return item["node"], item["identity"], item["remote"], when(item["since"]), rejected[0] if rejected else "-"


_COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[str, ...]]]] = {
    "workloads": (("WORKLOAD", "ADDRESS", "ACCOUNT", "TUNNEL", "SERVICES", "POLICIES"), _workload),
    "services": (("SERVICE", "ADDRESS", "PORTS"), _service),
    "policies": (("POLICY", "ACTION", "SCOPE", "RULES"), _policy),
    "certificates": (("SERIAL", "IDENTITY", "ISSUED", "EXPIRES", "STATE", "CALLER"), _certificate),
    "registrations": (("MACHINE", "GROUP", "ADDRESS", "ACCOUNT", "STATE", "SINCE"), _registration),
    "subscribers": (("NODE", "IDENTITY", "FROM", "SINCE", "REJECTED"), _subscriber),
}


def _version(arguments: argparse.Namespace) -> int:
    del arguments
    print(f"{PROGRAM} {importlib.metadata.version('hbone')}")
    return ExitCode.DONE
