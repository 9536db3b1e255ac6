"""Bad input of every kind to `miniistiod`: one sentence on standard error, the right exit code, nothing left behind."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
from typing import TYPE_CHECKING

import pytest
from tests.support.commands import MISUSE, NO, UNREACHABLE, UNREADABLE, Case, Commands, cases, commands

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

DOCUMENT = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: orders, namespace: shop}
spec: {address: "10.0.0.1", serviceAccount: orders}
"""


@pytest.fixture(scope="module")
def shell() -> Iterator[Commands]:
    with commands() as found:
        yield found


@pytest.fixture(scope="module")
def made(shell: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state that `init` made, to be copied."""
    directory = tmp_path_factory.mktemp("made")
    assert shell.run(["miniistiod", "init", "--state", "state"], directory).code == 0
    return directory / "state"


# --- what a case needs


def documents(directory: Path) -> None:
    """A directory of documents."""
    (directory / "mesh").mkdir()
    (directory / "mesh" / "shop.yaml").write_text(DOCUMENT)


def file(name: str, make: Callable[[Path], object] | str | bytes) -> Callable[[Path], None]:
    """Documents, and a file made so."""

    def prepare(directory: Path) -> None:
        documents(directory)
        path = directory / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file():
            path.unlink()
        if isinstance(make, str):
            path.write_text(make)
        elif isinstance(make, bytes):
            path.write_bytes(make)
        else:
            make(path)

    return prepare


def mode(bits: int) -> Callable[[Path], None]:
    """A state directory with these permissions."""

    def prepare(directory: Path) -> None:
        documents(directory)
        (directory / "state").chmod(bits)

    return prepare


def given_away(directory: Path) -> None:
    """A state directory of another user, or as near as we come to that."""
    documents(directory)
    if os.geteuid() == 0:
        os.chown(directory / "state", 4242, 4242)
    else:
        (directory / "state").chmod(0o750)


def newer(directory: Path) -> None:
    """A state of a later version."""
    documents(directory)
    connection = sqlite3.connect(directory / "state" / "state.db")
    connection.execute("PRAGMA user_version = 4242")
    for key in ("schema", "version", "schema_version", "format"):
        connection.execute("UPDATE meta SET value = '4242' WHERE key = ?", (key,))
    connection.commit()
    connection.close()


STATE = ("--state", "state")
RUN = (
    *("miniistiod", "run", "--config", "mesh", *STATE),
    *("--listen", "127.0.0.1:0", "--monitoring", "127.0.0.1:0"),
)
NEW = (*RUN, "--init")
TOKEN = ("miniistiod", "token", "create", *STATE, "--namespace", "shop", "--service-account", "orders")


def instead(argv: Sequence[str], option: str, value: str) -> tuple[str, ...]:
    """`argv` with another value of an option."""
    parts = list(argv)
    parts[parts.index(option) + 1] = value
    return tuple(parts)


def title(argv: Sequence[str]) -> str:
    """The command's words, for the name of a case."""
    words = [word for word in argv[1:3] if not word.startswith("-")]
    return " ".join([*words, *(["--init"] if "--init" in argv else [])])


BAD_ADDRESSES = ("", ":", "host:x", "127.0.0.1:65536", "127.0.0.1:-1", "[::1", "a:b:c", "http://a")
BAD_TIMES = ("", "10", "soon", "-1h", "1y", "0s", "9" * 400 + "s")
BAD_LABELS = ("", "a b", "a/b", "..", "UPPER", "x" * 300, "bücher", "a\nb")

ARGUMENTS = [
    Case(name="nothing", argv=["miniistiod"], word="COMMAND"),
    Case(name="an unknown command", argv=["miniistiod", "frobnicate"], word="frobnicate"),
    Case(name="an unknown option", argv=["miniistiod", "init", *STATE, "--port", "1"], word="--port"),
    Case(name="token and nothing more", argv=["miniistiod", "token"], word="COMMAND"),
    Case(name="run without a directory", argv=["miniistiod", "run", *STATE], word="--config"),
    Case(name="run and no word of a state", argv=["miniistiod", "run", "--config", "mesh"], word="--state"),
    *(
        Case(name=f"run {option} {value!r}", argv=instead(NEW, option, value), word="address", prepare=documents)
        for option in ("--listen", "--monitoring")
        for value in BAD_ADDRESSES
    ),
    *(
        Case(name=f"run {option} {value[:20]!r}", argv=[*NEW, option, value], prepare=documents)
        for option in ("--default-ttl", "--max-ttl")
        for value in BAD_TIMES
    ),
    Case(name="run with a limit over 90 days", argv=[*NEW, "--max-ttl", "91d"], word="90", prepare=documents),
    Case(
        name="run with a default over the limit",
        argv=[*NEW, "--default-ttl", "2h", "--max-ttl", "1h"],
        prepare=documents,
    ),
    *(
        Case(name=f"run --name {value[:20]!r}", argv=[*NEW, "--name", value], word="name", prepare=documents)
        for value in ("", "a b", "a/b", "x" * 300, "a\nb")
    ),
    Case(name="run --log-level loud", argv=[*NEW, "--log-level", "loud"], word="loud"),
    Case(name="run --log-format xml", argv=[*NEW, "--log-format", "xml"], word="xml"),
    *(
        Case(
            name=f"{title(argv)} in the domain {td[:20]!r}",
            argv=[*argv, "--trust-domain", td],
            word="trust domain",
            prepare=documents,
        )
        for argv in (("miniistiod", "init", *STATE), NEW)
        for td in ("", "UPPER", "a b", "a/b", "spiffe://a", "x" * 300)
    ),
    Case(name="get nothing", argv=["miniistiod", "get", *STATE], word="required"),
    Case(name="get something else", argv=["miniistiod", "get", "secrets", *STATE], word="secrets"),
    Case(name="check nothing", argv=["miniistiod", "check"], word="PATH"),
    Case(name="token revoke nothing", argv=["miniistiod", "token", "revoke", *STATE], word="ID"),
]

FILES = [
    *(
        Case(
            name=f"run with a directory of documents that is {how}",
            argv=instead(NEW, "--config", "given"),
            word="given",
            prepare=file("given", make),
        )
        for how, make in UNREADABLE.items()
    ),
    *(
        Case(name=f"check of a path that is {how}", argv=["miniistiod", "check", "given"], prepare=file("given", make))
        for how, make in UNREADABLE.items()
        if how in ("missing", "a link to itself", "a dangling link", "not UTF-8")
    ),
    *(
        Case(name=f"{title(argv)} without a state", argv=argv, word="state", prepare=documents)
        for argv in (RUN, (*TOKEN[:2], "list", *STATE), (*TOKEN[:2], "revoke", *STATE, "0123456789ab"))
    ),
    Case(name="token create without a state", argv=TOKEN, word="state"),
    Case(name="get without a state", argv=["miniistiod", "get", "workloads", *STATE], code=UNREACHABLE, word="state"),
    *(
        Case(name=f"{title(argv)} with a state that is {how}", argv=argv, word="state", prepare=file("state", make))
        for argv in (RUN, NEW, TOKEN, ("miniistiod", "init", *STATE))
        for how, make in UNREADABLE.items()
        if how in ("a link to itself", "a dangling link", "binary")
    ),
    Case(
        name="init below a file",
        argv=["miniistiod", "init", "--state", "file/state"],
        word="file",
        prepare=file("file", "x"),
    ),
]

WITH_STATE = [
    Case(name="init where there is a state", argv=["miniistiod", "init", *STATE], word="state"),
    *(
        Case(name=f"{title(argv)} with {how}", argv=argv, word="state", prepare=prepare)
        for argv in (RUN, TOKEN)
        for how, prepare in (
            ("a state open to others", mode(0o755)),
            ("another user's state", given_away),
            ("a state of a later version", newer),
        )
    ),
    *(
        Case(
            name=f"{title(argv)} with a database that is {how}",
            argv=argv,
            word="state",
            prepare=file("state/state.db", make),
            leaves=True,
        )
        for argv in (RUN, TOKEN)
        for how, make in UNREADABLE.items()
        if how not in ("missing", "a dangling link")
    ),
    Case(
        name="run in another domain",
        argv=[*RUN, "--trust-domain", "other.example"],
        word="other.example",
        prepare=documents,
        leaves=True,
    ),
    *(
        Case(
            name=f"token create {option} {value[:20]!r} ({len(value)})",
            argv=instead(TOKEN, option, value),
            leaves=True,
        )
        for option in ("--namespace", "--service-account")
        for value in BAD_LABELS
    ),
    *(
        Case(name=f"token create --name {value[:20]!r} ({len(value)})", argv=[*TOKEN, "--name", value], leaves=True)
        for value in BAD_LABELS
    ),
    *(
        Case(name=f"token create --ttl {value[:20]!r}", argv=[*TOKEN, "--ttl", value], leaves=True)
        for value in (*BAD_TIMES, "400d")
    ),
    *(
        Case(name=f"token create --out {path!r}", argv=[*TOKEN, "--out", path], word=path, leaves=True)
        for path in ("nowhere/token", "state/state.db/token", "/proc/token")
    ),
    Case(
        name="revoke a token that is none",
        argv=["miniistiod", "token", "revoke", *STATE, "0123456789ab"],
        code=NO,
        word="0123456789ab",
        leaves=True,
    ),
    Case(
        name="get without a daemon",
        argv=["miniistiod", "get", "workloads", *STATE],
        code=UNREACHABLE,
        word="run",
        leaves=True,
    ),
]

REVOKE = ("miniistiod", "revoke", *STATE)
LATER = [
    *(
        Case(
            name=f"run --registration-grace {value[:20]!r}",
            argv=[*NEW, "--registration-grace", value],
            prepare=documents,
        )
        for value in ("", "10", "-1s", "2d", "9" * 400 + "s")
    ),
    *(
        Case(
            name=f"run with issuers that are {how}",
            argv=[*NEW, "--issuers", "given"],
            prepare=file("given", make),
            leaves=True,
        )
        for how, make in UNREADABLE.items()
    ),
    *(
        Case(
            name=f"run with a CA that is {how}",
            argv=[*NEW, "--ca-dir", "given"],
            prepare=file("given", make),
            leaves=True,
        )
        for how, make in UNREADABLE.items()
    ),
    Case(name="revoke nothing", argv=REVOKE, word="--serial"),
    Case(name="revoke two things", argv=[*REVOKE, "--serial", "00", "--name", "a/b"], word="not allowed"),
    *(
        Case(
            name=f"{words[0]} {' '.join(words[1:])} without a state".replace("  ", " "),
            argv=["miniistiod", *words, *STATE],
            word="state",
        )
        for words in (["root", "show"], ["root", "rotate"], ["backup", "file"], ["revoke", "--name", "shop/a"])
    ),
]

LATER_WITH_STATE = [
    *(
        Case(name=f"revoke {option} {value[:20]!r}", argv=[*REVOKE, option, value], leaves=True)
        for option, values in {
            "--serial": ("", "xyz", "-1"),
            "--identity": ("", "web", "spiffe://", "spiffe://cluster.local", "spiffe://A/b", "ns/sa"),
            "--name": ("", "/", "a/", "a/b/c"),
        }.items()
        for value in values
    ),
    *(
        Case(
            name=f"root rotate --skew {value[:20]!r}",
            argv=["miniistiod", "root", "rotate", *STATE, "--skew", value],
            leaves=True,
        )
        for value in ("", "10", "-1s", "soon", "9" * 400 + "s")
    ),
    *(
        Case(
            name=f"root rotate --finish {step!r}",
            argv=["miniistiod", "root", "rotate", *STATE, "--finish", step],
            leaves=True,
        )
        for step in ("", "everything")
    ),
    *(
        Case(name=f"backup to {path!r}", argv=["miniistiod", "backup", *STATE, path], leaves=True)
        for path in ("nowhere/file", "state", "state/state.db/x", "/proc/file")
    ),
    *(
        Case(
            name=f"restore from a file that is {how}",
            argv=["miniistiod", "restore", *STATE, "given"],
            prepare=file("given", make),
            leaves=True,
        )
        for how, make in UNREADABLE.items()
    ),
]


@cases(ARGUMENTS, FILES, LATER)
def test_bad_input_to_miniistiod_is_told_in_one_sentence(case: Case, shell: Commands, tmp_path: Path) -> None:
    case.check(shell, tmp_path)


@cases(WITH_STATE, LATER_WITH_STATE)
def test_bad_input_to_miniistiod_with_a_state_is_told(case: Case, shell: Commands, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "state")
    (tmp_path / "state").chmod(0o700)
    case.check(shell, tmp_path)


def test_a_refused_token_is_not_kept(shell: Commands, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "state")
    (tmp_path / "state").chmod(0o700)
    assert shell.run([*TOKEN, "--out", "nowhere/token"], tmp_path).code == MISUSE
    assert "valid" not in shell.run(["miniistiod", "token", "list", *STATE], tmp_path).out


@pytest.mark.parametrize("option", ["--listen", "--monitoring"])
def test_a_port_in_use_is_told(shell: Commands, made: Path, tmp_path: Path, option: str) -> None:
    shutil.copytree(made, tmp_path / "state")
    (tmp_path / "state").chmod(0o700)
    documents(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        argv = instead(RUN, option, address)
        Case(name="", argv=argv, word=address).judge(shell.run(argv, tmp_path, seconds=8.0))


FINDINGS: dict[str, str] = {
    "words": "this is not what you want\n",
    "no YAML": "a: [\n",
    "a list": "- a\n- b\n",
    "an unknown kind": DOCUMENT.replace("WorkloadEntry", "Frobnicator"),
    "no kind": "metadata: {name: a}\n",
    "no name": DOCUMENT.replace("name: orders, ", ""),
    "an unknown field": DOCUMENT.replace("serviceAccount: orders", "serviceAcount: orders"),
    "a wrong address": DOCUMENT.replace("10.0.0.1", "10.0.0.256"),
    "a number for a name": DOCUMENT.replace("name: orders", "name: 5"),
    "one document twice": DOCUMENT + "---\n" + DOCUMENT,
    "an alias bomb": "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\n",
    "deep nesting": "[" * 3000,
    "control characters": "a: \x1b[31mred\n",
    "a tag of Python": "!!python/object/apply:os.system ['touch pwned']\n",
}


@pytest.mark.parametrize("name", FINDINGS)
def test_a_bad_document_is_found_with_its_file_and_line(shell: Commands, tmp_path: Path, name: str) -> None:
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "bad.yaml").write_text(FINDINGS[name])
    done = shell.run(["miniistiod", "check", "mesh"], tmp_path, seconds=10.0)
    assert "Traceback" not in done.err + done.out
    assert done.code == NO, (done.code, done.out, done.err)
    assert "bad.yaml:" in done.out
    assert "\x1b" not in done.out + done.err
    assert not (tmp_path / "pwned").exists()
