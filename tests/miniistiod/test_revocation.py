from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from hbone.identity import SpiffeId
from miniistiod import ca, issue_tokens, revocation
from miniistiod.auth import Authenticator, Presented, Refused
from miniistiod.registry import HboneMark
from miniistiod.revocation import REVOCATIONS, RevocationFeed
from miniistiod.store import CRL_FILE, Registration, Revoked, StaleAuthorityError, Store, serial_text
from ztunnel.wire import discovery_pb2, revocation_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOW = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
T = NOW.timestamp()
ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"
WEB = "spiffe://cluster.local/ns/shop/sa/web"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "state", "cluster.local", NOW) as store:
        yield store


def issued(store: Store, identity: str = ORDERS, *, name: str = "", now: float = T, **fields: Any) -> str:
    """A certificate in the register; its serial."""
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    signer = store.signer()
    leaf = ca.issue(signer, key, SpiffeId.parse(identity), datetime.timedelta(hours=24), moment)
    store.record_certificate(
        leaf,
        spiffe_id=identity,
        name=name,
        key_sha256="k",
        caller=fields.pop("caller", "certificate"),
        now=now,
        signer=ca.fingerprint(signer.certificate),
        **fields,
    )
    return serial_text(leaf.serial_number)


def token(store: Store, account: str = "orders", *, name: str | None = None, reusable: bool = False) -> str:
    return issue_tokens.create(
        store, namespace="shop", service_account=account, name=name, lifetime=None, reusable=reusable, now=T
    ).id


def machine(name: str = "orders-1", account: str = "orders", serial: str = "") -> Registration:
    return Registration(
        namespace="shop",
        name=name,
        group="orders",
        service_account=account,
        address="10.0.0.1",
        serial=serial,
        connected=T,
    )


def state_of(store: Store) -> dict[str, str]:
    return {item.serial: item.state(T + 10) for item in store.certificates(0.0)}


def test_a_certificate_goes_with_all_that_were_renewed_with_it(store: Store) -> None:
    first = issued(store)
    second = issued(store, parent=first)
    third = issued(store, parent=second)
    other = issued(store)
    assert set(store.revoke(T + 1, serial=second).certificates) == {second, third}
    assert state_of(store) == {first: "valid", second: "revoked", third: "revoked", other: "valid"}
    assert store.revoke(T + 2, serial=second) == Revoked()
    assert store.revoke(T + 2, serial="0" * 32) == Revoked()
    assert store.certificate(second).revoked == T + 1  # type: ignore[union-attr]  # it was just issued


def test_the_tokens_that_could_renew_it_go_too(store: Store) -> None:
    lasting, bystander = token(store, reusable=True), token(store, reusable=True)
    serial = issued(store, caller=f"reusable token {lasting}", token=lasting)
    assert store.revoke(T + 1, serial=serial).tokens == (lasting,)
    assert {item.id: item.state(T) for item in store.list_tokens()} == {lasting: "revoked", bystander: "valid"}


def test_an_identity_goes_wherever_it_is(store: Store) -> None:
    mine = [issued(store), issued(store, name="orders-1")]
    web = issued(store, WEB)
    tokens = {token(store), token(store, reusable=True)}
    token(store, "web")
    store.register(machine())
    store.register(machine("web-1", "web"))
    found = store.revoke(T + 1, spiffe_id=ORDERS)
    assert set(found.certificates) == set(mine)
    assert set(found.tokens) == tokens
    assert found.registrations == (("shop", "orders-1"),)
    assert state_of(store)[web] == "valid"
    assert store.identity_revoked(ORDERS) == T + 1
    assert store.identity_revoked(WEB) is None


def test_a_machine_goes_by_its_name(store: Store) -> None:
    first = issued(store, name="orders-1")
    renewed = issued(store, name="orders-1", parent=first)
    other = issued(store, name="orders-2")
    unused, elsewhere = token(store, name="orders-1"), token(store, name="orders-2")
    store.register(machine("orders-1"))
    store.register(machine("orders-2"))
    found = store.revoke(T + 1, name=("shop", "orders-1"))
    assert set(found.certificates) == {first, renewed}
    assert found.tokens == (unused,)
    assert found.registrations == (("shop", "orders-1"),)
    assert state_of(store)[other] == "valid"
    assert store.token(elsewhere).state(T) == "valid"  # type: ignore[union-attr]  # it was just made
    assert store.revoke(T + 2, name=("web", "orders-2")) == Revoked()


def test_a_revoked_machine_is_not_reached_in_plaintext_unless_asked_for(store: Store) -> None:
    for _ in range(2):
        store.mark("shop", "orders-1", "orders", "", T)
        issued(store, name="orders-1")
    assert store.revoke(T + 1, name=("shop", "orders-1")).marks == ()
    assert store.marks() == {("shop", "orders-1"): HboneMark(service_account="orders")}
    assert store.revoke(T + 2, name=("shop", "orders-1"), plaintext=True).marks == (("shop", "orders-1"),)
    assert store.marks() == {}


def test_a_machine_that_enrolled_again_keeps_its_registration(store: Store) -> None:
    first, again = issued(store, name="orders-1"), issued(store, name="orders-1")
    store.register(machine(serial=again))
    assert store.revoke(T + 1, serial=first).registrations == ()
    assert store.revoke(T + 2, serial=again).registrations == (("shop", "orders-1"),)


def test_a_revoked_certificate_opens_nothing(store: Store) -> None:
    serial = issued(store, name="orders-1")
    shown = Presented(identity=SpiffeId.parse(ORDERS), serial=serial, not_before=T - 120)
    authenticator = Authenticator(store)
    caller = authenticator.for_stream(shown, [], T)
    assert (caller.serial, caller.name) == (serial, "orders-1")
    store.revoke(T + 1, serial=serial)
    with pytest.raises(Refused, match="is revoked"):
        authenticator.for_stream(shown, [], T + 2)
    with pytest.raises(Refused, match="is revoked"):
        authenticator.for_certificate(shown, [], "key", T + 2)


def test_of_a_revoked_identity_no_unlisted_certificate_from_before_is_believed(store: Store) -> None:
    store.revoke(T, spiffe_id=ORDERS)
    authenticator = Authenticator(store)
    identity = SpiffeId.parse(ORDERS)
    with pytest.raises(Refused, match="was revoked after"):
        authenticator.for_stream(Presented(identity=identity, serial="ab", not_before=T - 1), [], T + 2)
    assert authenticator.for_stream(Presented(identity=identity, serial="ab", not_before=T + 1), [], T + 2)
    listed = issued(store, now=T + 1)  # enrolled again: its backdated begin is of no account
    assert authenticator.for_stream(Presented(identity=identity, serial=listed, not_before=T - 119), [], T + 2)


def test_a_serial_counts_for_the_identity_that_it_was_issued_for(store: Store) -> None:
    serial = issued(store)
    with pytest.raises(Refused, match="was issued for"):
        Authenticator(store).for_stream(Presented(identity=SpiffeId.parse(WEB), serial=serial), [], T)


def test_nothing_is_recorded_under_what_no_longer_holds(store: Store) -> None:
    before = store.generation
    issued(store, generation=before)
    store.revoke(T, spiffe_id=WEB)
    assert store.generation == before + 1
    with pytest.raises(StaleAuthorityError):
        issued(store, generation=before)
    assert len(store.certificates(0.0)) == 1


# -- lists


def serials(pem: str | bytes) -> list[str]:
    data = pem.encode() if isinstance(pem, str) else pem
    return [serial_text(item.serial_number) for item in x509.load_pem_x509_crl(data)]


def test_the_list_is_published_and_kept_current(store: Store) -> None:
    path = store.directory / CRL_FILE
    first = revocation.publish(store, store.signers(), T)
    assert first is not None
    assert first.number == 1
    assert path.read_text() == first.pem
    assert serials(path.read_bytes()) == []
    assert revocation.publish(store, store.signers(), T + 86_399) == first
    again = revocation.publish(store, store.signers(), T + 86_400)
    assert again is not None
    assert again.number == 2
    gone = issued(store)
    issued(store)
    store.revoke(T + 5, serial=gone)
    assert serials(revocation.publish(store, store.signers(), T + 6).pem) == [gone]  # type: ignore[union-attr]
    assert serials(path.read_bytes()) == [gone]
    assert path.stat().st_mode & 0o777 == 0o644
    late = revocation.publish(store, store.signers(), T + 2 * 86_400)
    assert late is not None
    assert serials(late.pem) == []  # it has ended by itself
    assert late.number == 4


def test_each_signer_has_its_own_list(store: Store) -> None:
    old = store.signer()
    of_old = issued(store)
    store.begin_rotation(ca.make_root("cluster.local", NOW), T, 0.0)
    crl = revocation.publish(store, store.signers(), T)
    assert crl is not None
    assert crl.pem.count("BEGIN X509 CRL") == 2
    store.revoke(T + 1, serial=of_old)
    pems = revocation.publish(store, store.signers(), T + 1).pem.partition("-----END X509 CRL-----\n")  # type: ignore[union-attr]
    lists = [x509.load_pem_x509_crl((pems[0] + pems[1]).encode()), x509.load_pem_x509_crl(pems[2].encode())]
    assert [len(list(item)) for item in lists] == [1, 0]
    assert lists[0].is_signature_valid(old.certificate.public_key())  # type: ignore[arg-type]  # P-256


def test_a_list_made_meanwhile_by_another_process_is_not_overwritten(store: Store) -> None:
    crl = revocation.publish(store, store.signers(), T)
    assert crl is not None
    assert not store.keep_crl(crl)
    store.revoke(T, spiffe_id=ORDERS)
    assert revocation.publish(store, store.signers(), T).number == 2  # type: ignore[union-attr]


def request(**versions: str) -> discovery_pb2.DeltaDiscoveryRequest:
    return discovery_pb2.DeltaDiscoveryRequest(type_url=REVOCATIONS, initial_resource_versions=versions)


def test_who_subscribes_is_sent_the_lists_and_each_change(store: Store) -> None:
    feed = RevocationFeed(stream="s")
    crl = revocation.publish(store, store.signers(), T)
    assert feed.take(crl) is None  # a stock ztunnel never asks
    feed.request(request())
    response = feed.take(crl)
    assert response is not None
    (resource,) = response.resources
    assert (resource.name, response.type_url, response.nonce) == ("mesh", REVOCATIONS, "s-r1")
    (der,) = revocation_pb2.RevocationLists.FromString(resource.resource.value).lists
    assert list(x509.load_der_x509_crl(der)) == []
    assert feed.take(crl) is None
    feed.request(request())  # an acknowledgement
    assert feed.take(crl) is None
    store.revoke(T, serial=issued(store))
    response = feed.take(revocation.publish(store, store.signers(), T))
    assert response is not None
    (der,) = revocation_pb2.RevocationLists.FromString(response.resources[0].resource.value).lists
    assert len(list(x509.load_der_x509_crl(der))) == 1


def test_who_comes_back_is_answered_without_what_it_has(store: Store) -> None:
    crl = revocation.publish(store, store.signers(), T)
    first = RevocationFeed(stream="s")
    first.request(request())
    response = first.take(crl)
    assert response is not None
    again = RevocationFeed(stream="t")
    again.request(request(mesh=response.resources[0].version))
    response = again.take(crl)
    assert response is not None
    assert list(response.resources) == []
