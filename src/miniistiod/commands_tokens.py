"""`miniistiod token create | list | renew | revoke`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbone.commandline import CommandError, ExitCode
from hbone.config import parse_duration
from hbone.daemon.files import write_private
from miniistiod import issue_tokens, revocation
from miniistiod.commandline import add_command, add_state, counted, say, show, table, when
from miniistiod.store import Store

if TYPE_CHECKING:
    import argparse

    from miniistiod.store import TokenRecord

__all__ = ["add"]


def add(commands: Any) -> None:
    """Declare the commands."""
    tokens = add_command(
        commands,
        "token",
        "make, list, renew and revoke tokens for hosts that have no certificate yet",
        lambda _: ExitCode.MISUSE,
        "miniistiod token create --state state/ --namespace shop --service-account orders --name orders-1",
        "miniistiod token create --state state/ --namespace shop --service-account orders --reusable --out istio-token",
        "miniistiod token list --state state/",
        "miniistiod token renew --state state/ 3f9c2a61d0b4 --out istio-token",
        "miniistiod token revoke --state state/ 3f9c2a61d0b4",
    )
    inner = tokens.add_subparsers(metavar="COMMAND", required=True)
    create = add_command(
        inner,
        "create",
        "make a token: one-time for `ztunnel enroll`, or reusable for a stock ztunnel",
        _token_create,
        "miniistiod token create --state state/ --namespace shop --service-account orders --name orders-1 --ttl 1h",
    )
    add_state(create)
    create.add_argument("--namespace", required=True, metavar="NS")
    create.add_argument("--service-account", required=True, metavar="SA")
    create.add_argument("--name", metavar="N", help="the WorkloadEntry that the host will be")
    create.add_argument("--ttl", metavar="TIME", help="how long it may be used (1h; reusable 90d)")
    create.add_argument("--reusable", action="store_true", help="one that a stock ztunnel presents again and again")
    create.add_argument(
        "--node", metavar="NODE", help="for the proxy of a node: it may ask for the identities of the workloads there"
    )
    create.add_argument("--group", metavar="WG", help="the host registers itself in this WorkloadGroup")
    _add_output(create)
    listing = add_command(
        inner, "list", "show tokens, without their secrets", _token_list, "miniistiod token list --state state/"
    )
    add_state(listing)
    listing.add_argument("--json", action="store_true")
    renew = add_command(
        inner,
        "renew",
        "make another token for what one was made for; a reusable one stays good until its end",
        _token_renew,
        "miniistiod token renew --state state/ 3f9c2a61d0b4 --out istio-token",
    )
    add_state(renew)
    renew.add_argument("id", metavar="ID")
    renew.add_argument("--ttl", metavar="TIME", help="how long it may be used (as long as the one before)")
    _add_output(renew)
    revoke = add_command(
        inner,
        "revoke",
        "make a token worthless",
        _token_revoke,
        "miniistiod token revoke --state state/ 3f9c2a61d0b4",
        "miniistiod token revoke --state state/ 3f9c2a61d0b4 --certificates",
    )
    add_state(revoke)
    revoke.add_argument("id", metavar="ID")
    revoke.add_argument(
        "--certificates",
        action="store_true",
        help="take back what it got too, with all that was renewed from it; its machines leave the mesh",
    )


def _add_output(command: Any) -> None:
    command.add_argument("--out", type=Path, metavar="FILE", help="write the token there, 0600, without a newline")
    command.add_argument(
        "--server", metavar="HOST", help="name or address that the host will dial, for the printed command"
    )
    command.add_argument("--json", action="store_true")


def _token_create(arguments: argparse.Namespace) -> int:
    with Store.open(arguments.state) as store:
        token = issue_tokens.create(
            store,
            namespace=arguments.namespace,
            service_account=arguments.service_account,
            name=arguments.name,
            lifetime=None if arguments.ttl is None else parse_duration(arguments.ttl),
            reusable=arguments.reusable,
            now=time.time(),
            node=arguments.node or "",
            group=arguments.group or "",
        )
    _hand_over(token, arguments, arguments.reusable)
    return ExitCode.DONE


def _token_renew(arguments: argparse.Namespace) -> int:
    now = time.time()
    with Store.open(arguments.state) as store:
        old = store.token(arguments.id)
        lifetime = None if arguments.ttl is None else parse_duration(arguments.ttl)
        token = issue_tokens.renew(store, arguments.id, lifetime=lifetime, now=now)
        assert old is not None
    _hand_over(token, arguments, old.kind == "reusable")
    if old.state(now) == "valid":
        end = f"stays good until {when(old.expires)}" if old.kind == "reusable" else "is revoked"
        say(f"{old.id}, the one before, {end}")
    return ExitCode.DONE


def _hand_over(token: issue_tokens.NewToken, arguments: argparse.Namespace, reusable: bool) -> None:
    if arguments.out is not None:
        try:
            write_private(arguments.out, token.text)
        except OSError as error:
            with Store.open(arguments.state) as store:
                store.revoke_token(token.id, time.time())
            raise CommandError(
                f"{str(arguments.out)!r} cannot be written: {(error.strerror or '').lower()}; the token was revoked"
            ) from None
    _show_token(token, arguments, reusable)


def _show_token(token: issue_tokens.NewToken, arguments: argparse.Namespace, reusable: bool) -> None:
    shown = {"id": token.id, "identity": token.identity, "expires": when(token.expires)}
    if arguments.json:
        show(json.dumps({**shown, **({} if arguments.out else {"token": token.text})}))
        return
    say(f"{token.id}  {token.identity}  until {when(token.expires)}")
    if arguments.out is not None:
        say(f"written to {arguments.out}")
    elif reusable:
        show(token.text)
    else:
        server = arguments.server or "HOST"
        say("on the host, with HOST the name or address of this control plane:")
        show(f"printf %s '{token.text}' | ztunnel enroll --server {server} --token-file -")


def _token_list(arguments: argparse.Namespace) -> int:
    now = time.time()
    with Store.open(arguments.state) as store:
        records = store.list_tokens()
    if arguments.json:
        show(json.dumps([_token_json(item, now) for item in records], indent=1))
        return ExitCode.DONE
    rows = [
        (
            item.id,
            item.kind,
            item.state(now),
            f"{item.namespace}/{item.service_account}",
            item.name or item.node or item.group or "-",
            when(item.expires),
        )
        for item in records
    ]
    table(("ID", "KIND", "STATE", "ACCOUNT", "NAME", "EXPIRES"), rows)
    return ExitCode.DONE


def _token_json(item: TokenRecord, now: float) -> dict[str, Any]:
    return {
        "id": item.id,
        "kind": item.kind,
        "state": item.state(now),
        "namespace": item.namespace,
        "serviceAccount": item.service_account,
        "name": item.name,
        "node": item.node or None,
        "group": item.group or None,
        "created": when(item.created),
        "expires": when(item.expires),
    }


def _token_revoke(arguments: argparse.Namespace) -> int:
    now = time.time()
    with Store.open(arguments.state) as store:
        if store.token(arguments.id) is None:
            raise CommandError(
                f"there is no token {arguments.id!r}; 'miniistiod token list' shows them", code=ExitCode.NO
            )
        if arguments.certificates:
            found = store.revoke(now, token=arguments.id)
            revocation.publish_own(store, now)
            say(f"{arguments.id} is revoked, and {counted(len(found.certificates), 'certificate')} that it got")
            return ExitCode.DONE
        store.revoke_token(arguments.id, now)
        left = [item for item in store.certificates(now, token=arguments.id) if item.revoked is None]
    say(f"{arguments.id} is revoked")
    if left:
        end = when(max(item.expires for item in left))
        stay, them = ("stays good", "it") if len(left) == 1 else ("stay good, the last", "them")
        say(
            f"{counted(len(left), 'certificate')} that it got {stay} until {end}, and can be renewed;"
            f" 'miniistiod token revoke {arguments.id} --certificates' takes {them} back"
        )
    return ExitCode.DONE
