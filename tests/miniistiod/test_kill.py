"""Killed at any instant while it issues and writes, it starts again with everything that it had acknowledged."""

from __future__ import annotations

import contextlib
import datetime
import random
import signal
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from tests.miniistiod.test_registrar import GROUPS, request
from tests.support.killing import Zygote, zygote
from tests.support.miniistiod import ADDRESS, AUTHORIZATION, CREATE_CERTIFICATE, DELTA, Applicant, bearer, uid
from tests.support.sizes import size

from hbone.errors import HboneError
from hbone.grpc import GrpcError, StatusCode
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient
from miniistiod import issue_tokens
from miniistiod.store import Store, serial_text
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.identity import Identity
    from miniistiod.store import IssuedCertificate

ROUNDS = size(300, 30)
TOKENS = 2
"""Tokens that are wanted in a round, by two rivals each; what is left of the round before comes first."""
SEED = 20_260_301


@attrs.define(eq=False)
class Ticket:
    """A one-time token that two want, each with a key of its own."""

    id: str
    text: str
    account: str
    rivals: tuple[Applicant, Applicant] = attrs.Factory(lambda: (Applicant(), Applicant()))
    winners: set[Applicant] = attrs.Factory(set)
    losers: set[Applicant] = attrs.Factory(set)

    @property
    def open(self) -> bool:
        return len(self.winners) + len(self.losers) < 2


@attrs.define
class Memory:
    """What was acknowledged, by any life of the control plane."""

    tickets: list[Ticket] = attrs.Factory(list)
    serials: set[str] = attrs.Factory(set)
    machines: set[str] = attrs.Factory(set)
    holders: list[tuple[Identity, str]] = attrs.Factory(list)
    """Who enrolled and was not revoked, with the name of its machine."""
    revoked: set[str] = attrs.Factory(set)
    """Serials of those who were revoked by a command that said so."""
    leaving: set[str] = attrs.Factory(set)
    """Machines that somebody at least tried to revoke."""
    lives: int = 0
    killed_starting: int = 0


class Client:
    """Everybody who calls during one life."""

    def __init__(self, memory: Memory, port: int, root: bytes) -> None:
        self._memory = memory
        self._port = port
        self._root = root

    async def ask(
        self, applicant: Applicant, metadata: list[tuple[str, str]], identity: Identity | None = None
    ) -> Identity:
        tls = TlsContext.client(identity, roots=self._root, server_name="localhost")
        async with GrpcClient.connect("127.0.0.1", self._port, tls) as client:
            found = applicant.identity(await client.unary(CREATE_CERTIFICATE, applicant.request(), metadata))
        self._memory.serials.add(serial_text(found.svid.serial))
        return found

    async def enrol(self, ticket: Ticket, applicant: Applicant) -> None:
        with contextlib.suppress(HboneError, OSError, trio.BrokenResourceError):
            try:
                identity = await self.ask(applicant, bearer(ticket.text))
            except GrpcError as error:
                if error.code is StatusCode.UNAUTHENTICATED:
                    ticket.losers.add(applicant)
                raise
            ticket.winners.add(applicant)
            self._memory.holders.append((identity, f"vm-{ticket.account}"))
            await self.join(identity, f"vm-{ticket.account}")
            await self.renew(identity)

    async def renew(self, identity: Identity) -> None:
        """Ask again and again, each time with the newest certificate."""
        with contextlib.suppress(HboneError, OSError, trio.BrokenResourceError):
            while True:
                identity = await self.ask(Applicant(), [], identity)

    async def join(self, identity: Identity, name: str) -> None:
        """Be registered; what it sees of itself was acknowledged."""
        tls = TlsContext.client(identity, roots=self._root, server_name="localhost")
        number = int(name.rpartition("-")[2].removeprefix("a"))
        async with (
            GrpcClient.connect("127.0.0.1", self._port, tls) as client,
            client.stream(DELTA, []) as stream,
        ):
            for url in (AUTHORIZATION, ADDRESS):
                await stream.send(request(url, name, f"10.3.{number // 250}.{number % 250 + 1}"))
            while name not in self._memory.machines:
                data = await stream.receive()
                assert data is not None
                for item in discovery_pb2.DeltaDiscoveryResponse.FromString(data).resources:
                    if item.name == uid(name):
                        self._memory.machines.add(name)


def check(store: Store, memory: Memory, serials: set[str]) -> None:
    """What was acknowledged is there, and no token has given two holders a certificate."""
    for serial in serials:
        assert store.certificate(serial) is not None
    listed = {item.id: item for item in store.list_tokens()}
    for ticket in memory.tickets:
        assert len(ticket.winners) <= 1
        if ticket.winners:
            assert listed[ticket.id].spent is not None
    assert memory.machines - memory.leaving <= {name for _, name in store.registrations()}
    register = {item.serial: item for item in store.certificates(0.0)}
    assert all(register[serial].revoked is not None for serial in memory.revoked)
    # Nothing that was renewed with a revoked certificate is left, whoever was quicker.
    assert not [item for item in register.values() if item.revoked is None and _revoked(register.get(item.parent))]


def _revoked(item: IssuedCertificate | None) -> bool:
    return item is not None and item.revoked is not None


def revoke_one(directory: Path, memory: Memory, chance: random.Random) -> None:
    """As `miniistiod revoke --serial` does, beside a control plane that issues."""
    identity, name = memory.holders.pop(chance.randrange(len(memory.holders)))
    memory.leaving.add(name)
    serial = serial_text(identity.svid.serial)
    with Store.open(directory) as store:
        assert store.revoke(datetime.datetime.now(datetime.UTC).timestamp(), serial=serial).certificates
    memory.revoked.add(serial)


def new_tickets(store: Store, memory: Memory) -> None:
    for _ in range(TOKENS - sum(ticket.open and not ticket.winners for ticket in memory.tickets)):
        account = f"a{len(memory.tickets)}"
        token = issue_tokens.create(
            store,
            namespace="shop",
            service_account=account,
            name=f"vm-{account}",
            lifetime=86_400.0,
            reusable=False,
            now=datetime.datetime.now(datetime.UTC).timestamp(),
            group="anyone",
        )
        memory.tickets.append(Ticket(token.id, token.text, account))


async def one_life(forks: Zygote, directory: Path, memory: Memory, chance: random.Random) -> None:
    state, mesh = directory / "state", directory / "mesh"
    victim = forks.start(
        directory / "log",
        *("run", "--config", mesh, "--state", state, "--listen", "127.0.0.1:0", "--monitoring", "127.0.0.1:0"),
        *("--log-format", "json", "--log-level", "info"),
    )
    if chance.random() < 0.15:
        await trio.sleep(chance.uniform(0.0, 0.2))
        memory.killed_starting += 1
    else:
        client = Client(memory, await victim.port(), (state / "root-cert.pem").read_bytes())
        (mesh / "mesh.yaml").write_text(GROUPS.replace("weight: 7", f"weight: {memory.lives + 8}"))
        enough = len(memory.serials) + chance.randrange(6)
        with trio.move_on_after(20) as patience:
            async with trio.open_nursery() as nursery:
                for ticket in memory.tickets:
                    for applicant in ticket.rivals if ticket.open else ():
                        if applicant not in ticket.losers:
                            nursery.start_soon(client.enrol, ticket, applicant)
                if memory.holders:
                    nursery.start_soon(client.renew, chance.choice(memory.holders)[0])
                if len(memory.holders) > 3 and chance.random() < 0.3:
                    nursery.start_soon(trio.to_thread.run_sync, revoke_one, state, memory, chance)
                while len(memory.serials) < enough:
                    await trio.sleep(0.001)
                await trio.sleep(chance.uniform(0.0, 0.1))
                nursery.cancel_scope.cancel()
        assert not patience.cancelled_caught
    assert victim.kill() == -signal.SIGKILL
    memory.lives += 1


@pytest.mark.timeout(size(3600, 600))
async def test_nothing_acknowledged_is_lost_and_no_token_works_twice(tmp_path: Path) -> None:
    chance, memory = random.Random(SEED), Memory()
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "mesh.yaml").write_text(GROUPS)
    Store.create(tmp_path / "state", "cluster.local", datetime.datetime.now(datetime.UTC)).close()
    with zygote() as forks:
        for _ in range(ROUNDS):
            before = set(memory.serials)
            with Store.open(tmp_path / "state") as store:
                new_tickets(store, memory)
            await one_life(forks, tmp_path, memory, chance)
            with Store.open(tmp_path / "state") as store:
                check(store, memory, memory.serials - before)
        with Store.open(tmp_path / "state") as store:
            check(store, memory, memory.serials)
            assert store.certificates(0.0)
            used = [ticket for ticket in memory.tickets if ticket.winners]
            for ticket in used:
                secret = bearer(ticket.text)[0][1].removeprefix("Bearer ")
                assert (
                    store.redeem(secret, "another key", datetime.datetime.now(datetime.UTC).timestamp()).token is None
                )
        victim = forks.start(
            tmp_path / "log",
            *("run", "--config", tmp_path / "mesh", "--state", tmp_path / "state"),
            *("--listen", "127.0.0.1:0", "--monitoring", "127.0.0.1:0", "--log-format", "json"),
        )
        client = Client(memory, await victim.port(), (tmp_path / "state" / "root-cert.pem").read_bytes())
        for ticket in chance.sample(used, min(5, len(used))):
            stranger = Applicant()
            with contextlib.suppress(GrpcError):
                await client.ask(stranger, bearer(ticket.text))
                raise AssertionError("a token was good for a second key")
        for identity, _ in chance.sample(memory.holders, min(3, len(memory.holders))):
            await client.ask(Applicant(), [], identity)
        assert victim.kill(signal.SIGTERM) == 0
    # It was killed at work, not asleep.
    assert len(memory.serials) > ROUNDS
    assert len(used) > ROUNDS // 3
    assert len(memory.machines) > ROUNDS // 10
    assert 0 < memory.killed_starting < ROUNDS
    assert memory.revoked
