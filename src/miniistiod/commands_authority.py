"""`miniistiod revoke | root | backup | restore`: they work on the state, whether a control plane runs on it or not."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from hbone.commandline import CommandError, ExitCode
from hbone.config import parse_duration
from hbone.errors import IdentityError
from hbone.identity import SpiffeId
from miniistiod import ca, expiry, revocation
from miniistiod.commandline import add_command, add_state, counted, say, show, table, when
from miniistiod.rotation import SKEW, Plan, Rotation, Step, plan
from miniistiod.store import CRL_FILE, ROOT_FILE, Store, serial_text
from miniistiod.store.backup import restore

if TYPE_CHECKING:
    import argparse

    from cryptography import x509

__all__ = ["add"]


def add(commands: Any) -> None:
    """Declare the commands."""
    _add_revoke(commands)
    _add_root(commands)
    _add_backup(commands)


# -- revoke


def _add_revoke(commands: Any) -> None:
    command = add_command(
        commands,
        "revoke",
        "take certificates back: no renewal, streams cut, tokens void, listed in the CRL",
        _revoke,
        "miniistiod revoke --state state/ --name shop/orders-1",
        "miniistiod revoke --state state/ --identity spiffe://cluster.local/ns/shop/sa/orders",
        "miniistiod revoke --state state/ --serial 0f3a9c5e0d1b42f7a8c6e2d4b1907f35",
    )
    add_state(command)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--serial", metavar="HEX", help="a certificate, with all that were renewed with it")
    which.add_argument("--identity", metavar="ID", help="a SPIFFE ID, or NS/sa/ACCOUNT: every certificate and token")
    which.add_argument("--name", metavar="NS/NAME", help="a machine, by the name that it was enrolled under")
    command.add_argument(
        "--plaintext",
        action="store_true",
        help="let peers reach its WorkloadEntry in plaintext again; else they insist on HBONE, which fails",
    )
    command.add_argument("--json", action="store_true")


def _revoke(arguments: argparse.Namespace) -> int:
    now = time.time()
    with Store.open(arguments.state) as store:
        serial = None if arguments.serial is None else _serial(arguments.serial)
        identity = None if arguments.identity is None else _identity(arguments.identity, store.trust_domain)
        name = None if arguments.name is None else _name(arguments.name)
        found = store.revoke(now, serial=serial, spiffe_id=identity, name=name, plaintext=arguments.plaintext)
        if not found and identity is None:
            what = f"certificate {serial}" if serial is not None else f"machine {arguments.name!r}"
            raise CommandError(
                f"there is nothing left to revoke of the {what}; 'miniistiod get certificates' shows what was issued",
                code=ExitCode.NO,
            )
        crl = revocation.publish_own(store, now)
    if arguments.json:
        show(json.dumps({**attrs.asdict(found), "crl": None if crl is None else crl.number}))
        return ExitCode.DONE
    say(
        f"revoked {counted(len(found.certificates), 'certificate')} and {counted(len(found.tokens), 'token')},"
        f" removed {counted(len(found.registrations), 'registration')}; open streams are cut within a second"
    )
    if found.marks:
        say(f"reached in plaintext from now on: {', '.join('/'.join(item) for item in found.marks)}")
    if crl is not None:
        say(f"list {crl.number} is in {arguments.state / CRL_FILE}, and goes to the ztunnels that are connected")
    else:
        say(f"the running control plane publishes the list ({arguments.state / CRL_FILE}): its CA is in files")
    return ExitCode.DONE


def _serial(text: str) -> str:
    try:
        number = int(text.replace(":", ""), 16)
    except ValueError:
        number = -1
    if not 0 < number < 1 << 160:
        raise CommandError(f"--serial is {text!r}; write it in hex, as 'miniistiod get certificates' shows it")
    return serial_text(number)


def _identity(text: str, trust_domain: str) -> str:
    parts = text.split("/")
    try:
        if len(parts) == 3 and parts[1] == "sa":
            return str(SpiffeId.istio(trust_domain, parts[0], parts[2]))
        identity = SpiffeId.parse(text)
    except IdentityError as error:
        raise CommandError(f"--identity is {text!r}: {error}; write NS/sa/ACCOUNT or a SPIFFE ID") from None
    if identity.trust_domain != trust_domain or identity.namespace is None:
        raise CommandError(f"--identity is {text!r}, which is not a workload of the trust domain {trust_domain!r}")
    return str(identity)


def _name(text: str) -> tuple[str, str]:
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise CommandError(f"--name is {text!r}; write namespace and name of the workload, for example shop/orders-1")
    return namespace, name


# -- root


def _add_root(commands: Any) -> None:
    root = add_command(
        commands,
        "root",
        "show the roots of the mesh, and rotate them in steps that break no connection",
        lambda _: ExitCode.MISUSE,
        "miniistiod root show --state state/",
        "miniistiod root rotate --state state/",
    )
    inner = root.add_subparsers(metavar="COMMAND", required=True)
    showing = add_command(
        inner,
        "show",
        "show the trust bundle, what signs, and when the next step of a rotation opens",
        _root_show,
        "miniistiod root show --state state/",
    )
    add_state(showing)
    showing.add_argument("--json", action="store_true")
    rotate = add_command(
        inner,
        "rotate",
        "put a new root beside the old one; later, take the steps that need your word",
        _root_rotate,
        "miniistiod root rotate --state state/",
        "miniistiod root rotate --state state/ --finish serving   # stock ztunnels' root files have both roots",
    )
    add_state(rotate)
    rotate.add_argument(
        "--finish",
        choices=[Step.SIGNING.value, Step.SERVING.value, Step.DONE.value],
        metavar="STEP",
        help="signing: the new root signs; serving: port 15012 shows it; done: the old root goes."
        " Only serving needs to be said, when the root files of stock ztunnels are updated",
    )
    rotate.add_argument("--now", action="store_true", help="take the step before it opens, and break what is not ready")
    rotate.add_argument(
        "--skew", metavar="TIME", default=f"{SKEW:g}s", help="how far behind hosts' clocks may be (2m); at the start"
    )
    rotate.add_argument("--json", action="store_true")


def _root_show(arguments: argparse.Namespace) -> int:
    with Store.open(arguments.state) as store:
        _show_roots(store, arguments)
    return ExitCode.DONE


def _root_rotate(arguments: argparse.Namespace) -> int:
    now = time.time()
    with Store.open(arguments.state) as store:
        rotation = store.rotation()
        if rotation is None:
            if arguments.finish is not None:
                raise CommandError("no rotation is under way; start one with 'miniistiod root rotate'")
            signer = ca.make_root(store.trust_domain, datetime.datetime.fromtimestamp(now, datetime.UTC))
            store.begin_rotation(signer, now, parse_duration(arguments.skew))
            say(f"both roots are published; {arguments.state / ROOT_FILE} has them, for the files of stock ztunnels")
        elif arguments.finish is not None:
            _finish(store, rotation, Step(arguments.finish), now, arguments.now)
        elif (following := _plan(store, rotation, now)).due(now):
            store.advance_rotation(following.next, now)
        revocation.publish(store, store.signers(), now)
        _show_roots(store, arguments)
    return ExitCode.DONE


def _finish(store: Store, rotation: Rotation, step: Step, now: float, early: bool) -> None:
    following = _plan(store, rotation, now)
    if following.next is not step:
        raise CommandError(
            f"the next step is {following.next.value!r}, not {step.value!r}; 'miniistiod root show' says what it"
            " waits for",
            code=ExitCode.NO,
        )
    if now < following.opens and not early:
        raise CommandError(
            f"the step {step.value!r} opens at {when(following.opens)}: it waits for {following.waits_for};"
            " wait, or take it with --now and break what is not ready",
            code=ExitCode.NO,
        )
    store.advance_rotation(step, now)


def _plan(store: Store, rotation: Rotation, now: float) -> Plan:
    return plan(rotation, store.facts(rotation, now))


def _show_roots(store: Store, arguments: argparse.Namespace) -> None:
    now = time.time()
    rotation = store.rotation()
    following = None if rotation is None else _plan(store, rotation, now)
    roots = [_root(store, item) for item in store.roots()]
    if arguments.json:
        shown: dict[str, Any] = {
            "trustDomain": store.trust_domain,
            "plugged": store.plugged() is not None,
            "roots": roots,
            "rotation": None,
        }
        if rotation is not None and following is not None:
            shown["rotation"] = {
                "step": rotation.step.value,
                "next": following.next.value,
                "opens": when(following.opens),
                "open": now >= following.opens,
                "byItself": following.by_itself,
                "waitsFor": following.waits_for,
            }
        show(json.dumps(shown, indent=1))
        return
    table(
        ("SHA-256", "CREATED", "EXPIRES", "SIGNS"),
        [(item["sha256"], item["created"], item["expires"], ", ".join(item["signs"]) or "-") for item in roots],
    )
    if rotation is not None and following is not None:
        opens = "is open" if now >= following.opens else f"opens at {when(following.opens)}"
        manner = "by itself" if following.by_itself else f"by 'miniistiod root rotate --finish {following.next.value}'"
        say(
            f"rotation: {rotation.step.value} since {when(_since(rotation))}; the step {following.next.value!r} {opens}"
        )
        say(f"taken {manner}; waits for {following.waits_for}")
    for text in expiry.warnings(store, now):
        say(text)


def _since(rotation: Rotation) -> float:
    return rotation.serving or rotation.signing or rotation.published


def _root(store: Store, certificate: x509.Certificate) -> dict[str, Any]:
    signs = []
    plugged = store.plugged()
    if plugged is not None:
        signs = ["workloads", "15012"] if certificate == store.server_root() else []
    else:
        signs += ["workloads"] if certificate == store.signer().certificate else []
        signs += ["15012"] if certificate == store.server_root() else []
    return {
        "sha256": ca.fingerprint(certificate),
        "subject": certificate.subject.rfc4514_string(),
        "created": when(certificate.not_valid_before_utc.timestamp()),
        "expires": when(certificate.not_valid_after_utc.timestamp()),
        "signs": signs,
    }


# -- backup, restore


def _add_backup(commands: Any) -> None:
    command = add_command(
        commands,
        "backup",
        "copy the state to a file, also while a control plane runs on it",
        _backup,
        "miniistiod backup --state state/ /secure/miniistiod.db",
    )
    add_state(command)
    command.add_argument("file", type=Path, metavar="FILE", help="written 0600, by rename; it holds the root's key")
    command = add_command(
        commands,
        "restore",
        "put a backup in the place of the state; every token of before becomes void",
        _restore,
        "miniistiod restore --state state/ /secure/miniistiod.db",
    )
    add_state(command)
    command.add_argument("file", type=Path, metavar="FILE", help="a backup of this or an older version")


def _backup(arguments: argparse.Namespace) -> int:
    with Store.open(arguments.state) as store:
        store.back_up(arguments.file)
        say(f"the state of {store.trust_domain!r} is in {arguments.file}, with the root's key; keep it as safe")
    return ExitCode.DONE


def _restore(arguments: argparse.Namespace) -> int:
    now = time.time()
    stamp = when(now).replace("-", "").replace(":", "")
    done = restore(arguments.state, arguments.file, now, stamp)
    with Store.open(arguments.state) as store:
        revocation.publish_own(store, now)
    say(f"restored the state of {done.trust_domain!r}; {done.tokens} tokens became void, so make new ones")
    if done.saved is not None:
        say(f"the state of before is kept in {done.saved}")
    if done.saved is None or not done.merged:
        say("what was issued or revoked after the backup is not known; revoke again what has to stay revoked")
    return ExitCode.DONE
