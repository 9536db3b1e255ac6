"""TLS: who is let in, who is not and why, and bytes both ways; two ends in memory."""

from __future__ import annotations

import ctypes
import gc
import random
import re
import weakref
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL, crypto
from tests.support.tls import RawClient, exchange, join, raw_context, read, take

import hbone.openssl
from hbone.errors import ConfigurationError, IdentityError, PeerIdentityError, PeerRevokedError, TlsError
from hbone.identity import Identity, RevocationLists, SpiffeId, TrustBundle
from hbone.identity.svid import UNPARSABLE
from hbone.testing.ca import WRONG_SVIDS, Issued, TestCa
from hbone.tls import MAX_READS_WITHOUT_DATA, IoBuffer, PortableTlsConnection, TlsConnection, TlsContext
from hbone.tlspeer import ON_VERIFY

CA = TestCa()
CLIENT = CA.identity("shop", "web")
SERVER = CA.identity("shop", "orders")
KINDS = [TlsConnection, PortableTlsConnection]


@pytest.fixture(params=KINDS, ids=["direct", "portable"])
def kind(request: pytest.FixtureRequest) -> type[TlsConnection]:
    chosen: type[TlsConnection] = request.param
    return chosen


def ends(
    kind: type[TlsConnection] = TlsConnection, client: Identity = CLIENT, server: Identity = SERVER
) -> tuple[TlsConnection, TlsConnection]:
    return (
        kind(TlsContext.client(client), server=False),
        kind(TlsContext.server(server), server=True),
    )


class MallInfo(ctypes.Structure):
    """What glibc says of its heap: ten numbers, of which the eighth is the bytes in use."""

    _fields_ = [*((f"field{number}", ctypes.c_size_t) for number in range(7)), ("used", ctypes.c_size_t)] + [
        (f"field{number}", ctypes.c_size_t) for number in (8, 9)
    ]


def joined(kind: type[TlsConnection] = TlsConnection) -> tuple[TlsConnection, TlsConnection]:
    client, server = ends(kind)
    assert join(client, server) == (None, None)
    return client, server


# The handshake


def test_the_tail_of_a_buffer_is_the_same_memory() -> None:
    buffer = IoBuffer(20)
    client = TlsConnection(TlsContext.client(CLIENT), server=False)
    client.handshake()
    tail = buffer.tail(9)
    tail.size = 5
    assert client.data_to_send_into(tail) == 5
    assert bytes(buffer.array[:9]) == bytes(9)
    assert bytes(buffer.array[9:12]) == b"\x16\x03\x01"  # a handshake record
    assert bytes(buffer.array[14:]) == bytes(6)


def test_openssl_is_called_directly_here() -> None:
    assert hbone.openssl.DIRECT


def test_each_end_knows_the_other(kind: type[TlsConnection]) -> None:
    client, server = joined(kind)
    assert client.peer_id == SERVER.id
    assert server.peer_id == CLIENT.id
    for end, peer in ((client, SERVER), (server, CLIENT)):
        assert end.peer_chain == (peer.svid.leaf,)
        assert end.peer_root == CA.root
        assert end.alpn == "h2"
        assert end.cipher == "TLS_AES_128_GCM_SHA256"
        assert end.group


def test_connections_to_one_peer_share_what_is_known_of_it(kind: type[TlsConnection]) -> None:
    pairs = [joined(kind) for _ in range(3)]
    for clients in ([client for client, _ in pairs], [server for _, server in pairs]):
        assert len({id(end.peer_id) for end in clients}) == 1
        assert len({id(end.peer_chain[0]) for end in clients}) == 1
        assert len({id(end.peer_root) for end in clients}) == 1


def test_a_certificate_is_parsed_once_for_many_handshakes() -> None:
    identity = CA.identity("shop", "parsed-once")
    hbone.openssl._parsed.cache_clear()
    for _ in range(3):
        assert join(*ends(client=identity)) == (None, None)
    assert hbone.openssl._parsed.cache_info().misses == 3  # the client's, the server's and the root


def test_a_large_certificate_is_not_kept_parsed() -> None:
    identity = CA.identity("shop", "large", dns=tuple(f"{'x' * 60}-{number}.example" for number in range(80)))
    assert len(identity.svid.leaf.public_bytes(serialization.Encoding.DER)) > 4096
    hbone.openssl._parsed.cache_clear()
    client, server = ends(client=identity)
    assert join(client, server) == (None, None)
    assert server.peer_chain == identity.svid.chain
    assert hbone.openssl._parsed.cache_info().currsize == 2  # the server's and the root


def test_a_new_certificate_of_the_same_peer_is_not_taken_for_the_old_one() -> None:
    servers = []
    for identity in (CLIENT, CA.identity("shop", "web"), CLIENT):
        client, server = ends(client=identity)
        assert join(client, server) == (None, None)
        assert server.peer_chain == identity.svid.chain
        servers.append(server)
    assert servers[0].peer_chain is servers[2].peer_chain
    assert servers[0].peer_chain != servers[1].peer_chain


def test_a_peer_is_forgotten_with_its_last_connection() -> None:
    identity = CA.identity("shop", "passing")
    kept = [ends(client=identity) for _ in range(2)]
    for client, server in kept:
        assert join(client, server) == (None, None)
    peer = weakref.ref(kept[0][1]._peer)
    del client, server
    kept.pop()
    gc.collect()
    assert peer() is not None
    kept.pop()
    gc.collect()
    assert peer() is None


def test_a_known_peer_is_verified_again() -> None:
    joined()
    refusing = TlsConnection(TlsContext.server(SERVER), server=True, authorize=lambda _: False)
    client = ends()[0]
    _, error = join(client, refusing)
    assert isinstance(error, PeerIdentityError)
    kept = joined()
    revoked = RevocationLists([CA.crl(CLIENT.svid.leaf)])
    strict = TlsConnection(TlsContext.server(SERVER, crls=revoked), server=True)
    _, error = join(ends()[0], strict)
    assert isinstance(error, PeerRevokedError)
    assert kept[1].peer_id == CLIENT.id


def test_what_asked_for_authorization_goes_with_the_handshake(kind: type[TlsConnection]) -> None:
    class Asked:
        def __call__(self, _: SpiffeId) -> bool:
            return True

    asked = Asked()
    gone = weakref.ref(asked)
    client, server = ends(kind)[0], kind(TlsContext.server(SERVER), server=True, authorize=asked)
    assert join(client, server) == (None, None)
    del asked
    assert gone() is None
    assert server._check.authorize is not None
    assert not server._check.authorize(CLIENT.id)  # nobody passes any more


def test_every_right_kind_of_key_works() -> None:
    for key in ("p256", "p384", "ed25519", "rsa2048"):
        identity = CA.identity("shop", "web", key=key)
        assert join(*ends(client=identity, server=identity)) == (None, None)


@pytest.mark.parametrize("suite", [b"TLS_AES_128_GCM_SHA256", b"TLS_AES_256_GCM_SHA384"])
def test_a_peer_may_choose_either_suite(suite: bytes) -> None:
    context = raw_context(CLIENT, alpn=[b"h2"])
    raw = RawClient(context)
    server = ends()[1]
    context_only = raw_context(CLIENT, alpn=[b"h2"])
    context_only.set_tls13_ciphersuites(suite)
    raw.connection = SSL.Connection(context_only, None)
    raw.connection.set_connect_state()
    raw.join(server)
    assert server.cipher == suite.decode()


def test_the_server_prefers_the_cheaper_suite() -> None:
    raw = RawClient(raw_context(CLIENT, alpn=[b"h2"]))
    context = raw_context(CLIENT, alpn=[b"h2"])
    context.set_tls13_ciphersuites(b"TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256")
    raw.connection = SSL.Connection(context, None)
    raw.connection.set_connect_state()
    server = ends()[1]
    raw.join(server)
    assert server.cipher == "TLS_AES_128_GCM_SHA256"


def test_another_suite_is_refused() -> None:
    context = raw_context(CLIENT, alpn=[b"h2"])
    raw = RawClient(context)
    context = raw_context(CLIENT, alpn=[b"h2"])
    context.set_tls13_ciphersuites(b"TLS_CHACHA20_POLY1305_SHA256")
    raw.connection = SSL.Connection(context, None)
    raw.connection.set_connect_state()
    with pytest.raises(TlsError, match="no shared cipher"):
        raw.join(ends()[1])


def test_tls_1_2_is_refused() -> None:
    context = raw_context(CLIENT, alpn=[b"h2"])
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    server = ends()[1]
    with pytest.raises(TlsError, match=r"does not speak TLS 1\.3"):
        RawClient(context).join(server)


REASONS = {
    "two URI names": "2 URI names",
    "a second URI name that is no SPIFFE ID": "2 URI names",
    "no names": "0 URI names",
    "only a DNS name": "0 URI names",
    "only an IP address": "0 URI names",
    "a CA as leaf": "CA certificate",
    "a signing CA as leaf": "CA certificate",
    "keyCertSign": "keyCertSign or cRLSign",
    "cRLSign": "keyCertSign or cRLSign",
    "no digitalSignature": "lacks digitalSignature|does not allow this use",
    "no key usage": "no key usage",
    "key usage not critical": "not marked critical",
    "only serverAuth": "lacks clientAuth|does not allow this use",
    "only clientAuth": "lacks serverAuth|does not allow this use",
    "another purpose": "does not allow this use",
    "expired": r"it expired at \d{4}-",
    "not yet valid": r"not valid before \d{4}-.*compare the clocks",
    "names not critical and no subject": "not marked critical",
    "another trust domain": r"elsewhere\.example, for which we hold no roots",
    "no path": "has no path",
    "an over-long ID": "at most 2048",
    "an upper-case scheme": "is not a SPIFFE ID",
    "another scheme": "is not a SPIFFE ID",
    "an upper-case trust domain": "malformed",
    "a port": "malformed",
    "user information": "malformed",
    "a dot segment": "has the segment",
    "a root path": "empty segment",
    "a trailing slash": "empty segment",
    "an empty segment": "empty segment",
}


@pytest.mark.parametrize("wrong", WRONG_SVIDS)
def test_each_wrong_certificate_is_refused_by_both_ends_with_its_reason(kind: type[TlsConnection], wrong: str) -> None:
    bad = CA.wrong_identity(wrong)
    reason = REASONS.get(wrong, "malformed")

    at_client, at_server = join(*ends(kind, client=bad))
    assert isinstance(at_server, PeerIdentityError)
    assert re.search(reason, str(at_server))
    assert isinstance(at_client, TlsError)
    assert "the peer refused our certificate" in str(at_client) or kind is PortableTlsConnection

    at_client, at_server = join(*ends(kind, server=bad))
    assert isinstance(at_client, PeerIdentityError)
    assert re.search(reason, str(at_client))
    assert isinstance(at_server, TlsError)
    for error in (at_client, at_server):
        assert "\n" not in str(error)
        assert len(str(error)) < 400


def test_our_own_certificate_is_named_when_the_peer_refuses_it() -> None:
    expired = CA.wrong_identity("expired")
    at_client, _ = join(*ends(client=expired))
    assert re.search(
        r"the peer refused our certificate: certificate expired \(we are spiffe://\S+, valid until \d{4}-",
        str(at_client),
    )


def test_a_client_without_a_certificate_is_refused() -> None:
    server = ends()[1]
    raw = RawClient(raw_context(alpn=[b"h2"]))
    with pytest.raises(PeerIdentityError, match="no certificate"):
        raw.join(server)
    with pytest.raises(SSL.Error, match="certificate required"):
        raw.connection.recv(1)


def test_an_unknown_root_is_named(kind: type[TlsConnection]) -> None:
    stranger = TestCa(name="somebody else's root")
    identity = Identity(stranger.svid("shop", "web"), CA.bundle)
    _, at_server = join(*ends(kind, client=identity))
    assert isinstance(at_server, PeerIdentityError)
    assert "somebody else's root" in str(at_server)
    assert "no root of ours" in str(at_server)


def test_a_chain_of_intermediates_leads_to_its_root() -> None:
    lower = CA.intermediate("upper").intermediate("lower")
    identity = Identity(lower.svid("shop", "web"), CA.bundle)
    client, server = ends(client=identity)
    assert join(client, server) == (None, None)
    assert server.peer_chain == identity.svid.chain
    assert len(server.peer_chain) == 3
    assert server.peer_root == CA.root


def test_a_missing_intermediate_is_refused() -> None:
    issued = CA.intermediate("upper").issue(uris=[str(CLIENT.id)])
    bare = type(issued)(issued.chain[:1], issued.key).unchecked_svid(CLIENT.id)
    _, at_server = join(*ends(client=Identity(bare, CA.bundle)))
    assert "which is no root of ours" in str(at_server)


def test_an_intermediate_is_no_trust_anchor() -> None:
    middle = CA.intermediate()
    bundle = object.__new__(TrustBundle)
    object.__setattr__(bundle, "trust_domain", "cluster.local")
    object.__setattr__(bundle, "roots", (middle.certificate,))
    identity = Identity(middle.svid("shop", "orders"), {"cluster.local": bundle})
    _, at_server = join(*ends(client=Identity(middle.svid("shop", "web"), CA.bundle), server=identity))
    assert isinstance(at_server, PeerIdentityError)


def test_a_root_that_signed_the_leaf_itself_is_not_sent() -> None:
    server = ends()[1]
    raw = RawClient(raw_context(CLIENT, alpn=[b"h2"]))
    raw.join(server)
    assert raw.connection.get_peer_cert_chain(as_cryptography=True) == [SERVER.svid.leaf]


def test_a_root_at_the_end_of_a_chain_is_not_sent() -> None:
    issued = CA.intermediate().issue(uris=[str(SERVER.id)])
    with_root = type(issued)((*issued.chain, CA.root), issued.key)
    server = TlsConnection(TlsContext.server(Identity(with_root.svid(), CA.bundle)), server=True)
    raw = RawClient(raw_context(CLIENT, alpn=[b"h2"]))
    raw.join(server)
    sent = raw.connection.get_peer_cert_chain(as_cryptography=True)
    assert sent == list(issued.chain)


# Trust domains

OTHER = TestCa("other.example")


def federated(ca: TestCa, account: str, *also: TestCa) -> Identity:
    return ca.identity("shop", account, also=also)


def test_two_trust_domains_that_know_each_other_meet() -> None:
    client, server = ends(client=federated(CA, "web", OTHER), server=federated(OTHER, "orders", CA))
    assert join(client, server) == (None, None)
    assert server.peer_id == CA.id("shop", "web")
    assert server.peer_root == CA.root
    assert client.peer_id == OTHER.id("shop", "orders")


@pytest.mark.parametrize("order", [1, -1])
def test_with_two_roots_peers_of_either_are_believed(order: int) -> None:
    old, new = TestCa(), TestCa()
    both = TrustBundle("cluster.local", (old.root, new.root)[::order])
    server = Identity(new.svid("shop", "orders"), both)
    for ca in (old, new):
        client, there = ends(client=Identity(ca.svid("shop", "web"), both), server=server)
        assert join(client, there) == (None, None)
        assert there.peer_root == ca.root
    stranger = Identity(TestCa().svid("shop", "web"), both)
    _, at_server = join(*ends(client=stranger, server=server))
    assert at_server is not None


def test_a_root_of_one_trust_domain_cannot_sign_for_another(kind: type[TlsConnection]) -> None:
    stolen = OTHER.issue(uris=[str(CA.id("shop", "web"))])
    client = Identity(stolen.svid(), [CA.bundle, OTHER.bundle])
    at_client, at_server = join(*ends(kind, client=client, server=federated(CA, "orders", OTHER)))
    assert isinstance(at_server, PeerIdentityError)
    assert "not a root of trust domain cluster.local" in str(at_server)
    assert at_client is not None


def test_a_cross_signed_ca_is_judged_by_the_root_its_chain_leads_to() -> None:
    by_other = CA.cross_signed(OTHER)
    client = Identity(by_other.svid("shop", "web"), CA.bundle)
    # We hold CA's own root, of the same name and key, too: OpenSSL ends the path there, which is right.
    ours, server = ends(client=client, server=federated(CA, "orders", OTHER))
    assert join(ours, server) == (None, None)
    assert server.peer_root == CA.root
    # Who holds only OTHER's root sees an identity of CA's trust domain under a root that may not sign for it.
    _, at_server = join(*ends(client=Identity(client.svid, OTHER.bundle), server=federated(OTHER, "orders")))
    assert isinstance(at_server, PeerIdentityError)


# Authorization inside the handshake


def test_a_peer_that_may_not_come_is_told_by_an_alert(kind: type[TlsConnection]) -> None:
    asked: list[SpiffeId] = []

    def authorize(peer: SpiffeId) -> bool:
        asked.append(peer)
        return False

    client = kind(TlsContext.client(CLIENT), server=False)
    server = kind(TlsContext.server(SERVER), server=True, authorize=authorize)
    at_client, at_server = join(client, server)
    assert asked == [CLIENT.id]
    assert isinstance(at_server, PeerIdentityError)
    assert str(CLIENT.id) in str(at_server)
    assert "not authorized" in str(at_server)
    assert (server.peer_id, server.refused_id) == (None, CLIENT.id)
    assert client.refused_id is None
    assert isinstance(at_client, TlsError)


def test_a_client_sends_no_certificate_to_a_server_that_it_refuses() -> None:
    client = TlsConnection(TlsContext.client(CLIENT), server=False, authorize=lambda _: False)
    server = ends()[1]
    join(client, server)
    assert server.peer_id is None
    assert not server._check.path


def test_a_fault_of_the_authorizer_refuses_and_is_raised(kind: type[TlsConnection]) -> None:
    def authorize(_: SpiffeId) -> bool:
        raise ZeroDivisionError

    client = ends(kind)[0]
    server = kind(TlsContext.server(SERVER), server=True, authorize=authorize)
    at_client, at_server = join(client, server)
    assert isinstance(at_server, ZeroDivisionError)
    assert isinstance(at_client, TlsError)
    with pytest.raises(TlsError):
        server.handshake()


def with_unreadable_subject(*, signed: bool) -> Identity:
    """Its subject is a string of a type that does not exist. OpenSSL reads over that."""
    issued = CA.issue(uris=[str(CA.id("shop", "wrong"))], common_name="unreadable", san_critical=False)
    leaf = issued.leaf
    content = leaf.tbs_certificate_bytes.replace(b"\x0c\x0aunreadable", b"\x0d\x0aunreadable")
    signature = b""
    assert isinstance(CA.key, ec.EllipticCurvePrivateKey)
    while len(signature) != len(leaf.signature):
        signature = CA.key.sign(content if signed else b"another", ec.ECDSA(hashes.SHA256()))
    encoded = leaf.public_bytes(serialization.Encoding.DER)
    encoded = encoded.replace(leaf.tbs_certificate_bytes, content).replace(leaf.signature, signature)
    damaged = Issued((x509.load_der_x509_certificate(encoded),), issued.key)
    return Identity(damaged.unchecked_svid(), [CA.bundle])


@pytest.mark.parametrize("signed", [True, False])
def test_a_certificate_that_cannot_be_read_is_the_peers_fault(kind: type[TlsConnection], signed: bool) -> None:
    bad = with_unreadable_subject(signed=signed)
    for error in (join(*ends(kind, client=bad))[1], join(*ends(kind, server=bad))[0]):
        assert isinstance(error, PeerIdentityError)
        assert (
            "cannot be parsed" if signed else "signature failure" if kind is TlsConnection else "is refused"
        ) in str(error)


@pytest.mark.filterwarnings("ignore")  # those of the library about what it reads
@given(st.data())
@settings(max_examples=60)
def test_any_damage_to_a_certificate_is_refused(data: st.DataObject) -> None:
    encoded = bytearray(CLIENT.svid.leaf.public_bytes(serialization.Encoding.DER))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        context = raw_context(alpn=[b"h2"])
        context.use_certificate(x509.load_der_x509_certificate(bytes(encoded)))
        context.use_privatekey(CLIENT.svid.key)
    except (SSL.Error, crypto.Error, *UNPARSABLE):
        return  # no TLS library would send it
    with pytest.raises(TlsError):
        RawClient(context).join(ends()[1])


def test_an_error_without_a_certificate_is_a_refusal() -> None:
    assert ON_VERIFY is not None
    lib = hbone.openssl.lib
    store = lib.X509_STORE_CTX_new()
    try:
        assert ON_VERIFY(1, store) == 0
    finally:
        lib.X509_STORE_CTX_free(store)


# ALPN


def test_a_client_that_offers_other_protocols_is_refused_with_an_alert() -> None:
    raw = RawClient(raw_context(CLIENT, alpn=[b"http/1.1"]))
    with pytest.raises(TlsError, match=r"offers the protocols 'http/1\.1', and not h2"):
        raw.join(ends()[1])
    with pytest.raises(SSL.Error, match="no application protocol"):
        raw.connection.do_handshake()


def test_h2_is_chosen_wherever_it_stands() -> None:
    server = ends()[1]
    RawClient(raw_context(CLIENT, alpn=[b"http/1.1", b"h2"])).join(server)
    assert server.alpn == "h2"


def test_a_client_without_alpn_is_refused(kind: type[TlsConnection]) -> None:
    raw = RawClient(raw_context(CLIENT))
    server = ends(kind)[1]
    with pytest.raises(TlsError, match="h2 is required"):
        raw.join(server)
    with pytest.raises(SSL.ZeroReturnError):
        raw.connection.recv(1)


def test_a_server_without_alpn_is_refused() -> None:
    connection = SSL.Connection(raw_context(SERVER), None)
    connection.set_accept_state()
    client = ends()[0]
    client.handshake()
    connection.bio_write(take(client))
    with pytest.raises(SSL.WantReadError):
        connection.do_handshake()
    client.receive_data(connection.bio_read(65536))
    with pytest.raises(TlsError, match="h2 is required"):
        client.handshake()


# Resumption


def test_a_session_is_never_resumed() -> None:
    context = raw_context(CLIENT, CLIENT.bundles["cluster.local"].roots, alpn=[b"h2"])
    context.set_session_cache_mode(SSL.SESS_CACHE_CLIENT)
    server_context = TlsContext.server(SERVER)
    first = TlsConnection(server_context, server=True)
    raw = RawClient(context)
    raw.join(first)
    with pytest.raises(SSL.WantReadError):
        raw.connection.recv(1)  # tickets, if there were any, would be taken here
    session = raw.connection.get_session()
    assert session is not None

    second = TlsConnection(server_context, server=True)
    again = RawClient(raw_context(CLIENT, alpn=[b"h2"]))
    again.connection = SSL.Connection(context, None)
    again.connection.set_connect_state()
    again.connection.set_session(session)
    again.join(second)
    assert SSL._lib.SSL_session_reused(again.connection._ssl) == 0  # type: ignore[attr-defined]
    assert second._check.accepted
    assert second.peer_id == CLIENT.id


# The control plane: names and addresses


def control_plane(*names: str, client_certificate: Any = "optional", **issue: Any) -> TlsConnection:
    certificate = CA.server(*names, **issue).server_certificate()
    context = TlsContext.server(certificate, client_certificate, bundles=CA.bundle)
    return TlsConnection(context, server=True)


def to(name: str, *alt_names: str, identity: Identity | None = None, ca: TestCa = CA) -> TlsConnection:
    context = TlsContext.client(identity, roots=ca.root_pem, server_name=name, alt_names=alt_names)
    return TlsConnection(context, server=False)


NAMES = [
    (("istiod.example",), "istiod.example", True),
    (("istiod.example",), "ISTIOD.example", True),
    (("istiod.example",), "istiod.example.evil", False),
    (("istiod.example",), "evil.istiod.example", False),
    (("istiod.example",), "istiod", False),
    (("other.example", "istiod.example"), "istiod.example", True),
    (("*.example.com",), "a.example.com", True),
    (("*.example.com",), "a.b.example.com", False),
    (("*.example.com",), "example.com", False),
    (("a*.example.com",), "ab.example.com", False),
    (("*.com",), "example.com", False),
    (("*",), "localhost", False),
    (("10.0.0.1",), "10.0.0.1", True),
    (("10.0.0.1",), "10.0.0.2", False),
    (("fd00::1",), "fd00::1", True),
    (("fd00::1",), "fd00:0::1", True),
    (("fd00::1",), "fd00::2", False),
    (("istiod.example",), "10.0.0.1", False),
    (("localhost", "127.0.0.1"), "127.0.0.1", True),
]


@pytest.mark.parametrize(("names", "wanted", "good"), NAMES, ids=str)
def test_a_server_must_bear_the_name_or_address(names: tuple[str, ...], wanted: str, good: bool) -> None:
    # One name: OpenSSL checks it, and so do we. With an alternative: we alone. They must agree.
    for client in (to(wanted), to(wanted, "nobody.example"), to("nobody.example", wanted)):
        at_client, at_server = join(client, control_plane(*names))
        assert (at_client is None) == (at_server is None) == good
        if at_client is not None:
            assert isinstance(at_client, PeerIdentityError)
            assert "is not for" in str(at_client)


def test_a_dns_name_that_looks_like_an_address_is_no_address() -> None:
    issued = CA.issue(dns=["10.0.0.1"]).server_certificate()
    server = TlsConnection(TlsContext.server(issued, "optional", bundles=CA.bundle), server=True)
    assert isinstance(join(to("10.0.0.1"), server)[0], PeerIdentityError)


def test_a_common_name_is_no_name() -> None:
    for issued in (
        CA.issue(common_name="istiod.example"),
        CA.issue(common_name="istiod.example", uris=[str(SERVER.id)]),
    ):
        server = TlsConnection(
            TlsContext.server(issued.server_certificate(), "optional", bundles=CA.bundle), server=True
        )
        assert isinstance(join(to("istiod.example"), server)[0], PeerIdentityError)


def test_a_workload_cannot_pose_as_the_control_plane() -> None:
    server = TlsConnection(TlsContext.server(SERVER, "optional"), server=True)
    for client in (to("istiod.example"), to("127.0.0.1"), to("istiod.example", "localhost")):
        at_client, _ = join(client, server)
        assert isinstance(at_client, PeerIdentityError)
        assert "is not for" in str(at_client)
        server = TlsConnection(TlsContext.server(SERVER, "optional"), server=True)


def test_the_control_planes_root_is_checked() -> None:
    at_client, _ = join(to("localhost", ca=TestCa()), control_plane())
    assert isinstance(at_client, PeerIdentityError)
    assert "no root of ours" in str(at_client)


def test_a_client_certificate_is_optional_there() -> None:
    server = control_plane()
    assert join(to("localhost"), server) == (None, None)
    assert server.peer_id is None
    assert server.peer_chain == ()
    server = control_plane()
    assert join(to("localhost", identity=CLIENT), server) == (None, None)
    assert server.peer_id == CLIENT.id


def test_a_client_certificate_that_is_given_is_verified_there() -> None:
    for wrong in ("two URI names", "expired", "another trust domain"):
        at_client, at_server = join(to("localhost", identity=CA.wrong_identity(wrong)), control_plane())
        assert isinstance(at_server, PeerIdentityError)
        assert "the peer refused our certificate" in str(at_client)
    stranger = Identity(TestCa().svid("shop", "web"), CA.bundle)
    assert isinstance(join(to("localhost", identity=stranger), control_plane())[1], PeerIdentityError)


def test_a_client_certificate_may_be_required_there() -> None:
    at_client, at_server = join(to("localhost"), control_plane(client_certificate="required"))
    assert isinstance(at_server, PeerIdentityError)
    assert "certificate required (we have none to present)" in str(at_client)


def test_the_name_is_sent_to_the_control_plane_only() -> None:
    seen: list[bytes | None] = []
    context = raw_context(SERVER)
    context.set_tlsext_servername_callback(lambda connection: seen.append(connection.get_servername()))
    for client in (to("istiod.example"), to("10.0.0.1"), ends()[0]):
        client.handshake()
        connection = SSL.Connection(context, None)
        connection.set_accept_state()
        connection.bio_write(take(client))
        with pytest.raises(SSL.WantReadError):
            connection.do_handshake()
    assert seen == [b"istiod.example", None, None]


@pytest.mark.parametrize("name", ["", "a b", "https://istiod", "istiod:15012", "a..b", "ö.example", "a/b", "a" * 64])
def test_a_malformed_server_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError):
        TlsContext.client(roots=CA.root_pem, server_name=name)


def test_incomplete_contexts_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs an identity"):
        TlsContext.client()
    with pytest.raises(ConfigurationError, match="needs an identity"):
        TlsContext.client(CLIENT, server_name="istiod")
    with pytest.raises(ConfigurationError, match="server name"):
        TlsContext.client(roots=CA.root_pem)
    with pytest.raises(IdentityError, match="empty"):
        TlsContext.client(roots=(), server_name="istiod")
    with pytest.raises(ConfigurationError, match="needs bundles"):
        TlsContext.server(CA.server().server_certificate())
    with pytest.raises(ConfigurationError, match="server's connection was given a client's context"):
        TlsConnection(TlsContext.client(CLIENT), server=True)


# Revocation


@pytest.mark.parametrize("level", ["leaf", "intermediate"])
def test_a_revoked_certificate_is_refused_in_the_whole_chain(level: str) -> None:
    middle = CA.intermediate()
    identity = Identity(middle.svid("shop", "web"), CA.bundle)
    crl = middle.crl(identity.svid.leaf) if level == "leaf" else CA.crl(middle.certificate)
    server = TlsConnection(TlsContext.server(SERVER, crls=[crl]), server=True)
    _, at_server = join(TlsConnection(TlsContext.client(identity), server=False), server)
    assert isinstance(at_server, PeerIdentityError)
    assert "was revoked" in str(at_server)
    client = TlsConnection(TlsContext.client(SERVER, crls=[crl]), server=False)
    at_client, _ = join(client, TlsConnection(TlsContext.server(identity), server=True))
    assert isinstance(at_client, PeerIdentityError)


def test_an_unknown_status_passes_and_a_forged_list_counts_for_nothing() -> None:
    forger = TestCa()
    forger.subject = CA.subject
    for crl in (CA.crl(), forger.crl(CLIENT.svid.leaf), TestCa().crl(CLIENT.svid.leaf), CA.crl(ttl=-1)):
        server = TlsConnection(TlsContext.server(SERVER, crls=[crl]), server=True)
        assert join(TlsConnection(TlsContext.client(CLIENT), server=False), server) == (None, None)


# Rotation


def test_contexts_are_made_once_per_identity() -> None:
    assert TlsContext.client(CLIENT) is TlsContext.client(CLIENT)
    assert TlsContext.server(SERVER) is TlsContext.server(SERVER)
    assert TlsContext.server(SERVER) is not TlsContext.server(SERVER, "optional")
    assert TlsContext.client(CLIENT) is not TlsContext.client(CA.identity("shop", "web"))


def test_rotation_leaves_a_live_connection_alone_and_frees_the_old_context() -> None:
    old = CA.identity("shop", "web", ttl=60)
    client, server = ends(client=old)
    assert join(client, server) == (None, None)
    context = weakref.ref(TlsContext.client(old))
    del old
    gc.collect()
    fresh = CA.identity("shop", "web")
    later, accepted = ends(client=fresh)
    assert join(later, accepted) == (None, None)
    assert accepted.peer_chain == fresh.svid.chain
    assert exchange(client, server, b"still here") == b"still here"
    assert exchange(server, client, b"and back") == b"and back"
    assert context() is client.context
    del client
    gc.collect()
    assert context() is None


# Bytes


@pytest.mark.parametrize("size", [1, 16_384, 16_385, 300_000])
def test_bytes_arrive_as_they_were(kind: type[TlsConnection], size: int) -> None:
    client, server = joined(kind)
    data = bytes(range(256)) * (size // 256 + 1)
    assert exchange(client, server, data[:size]) == data[:size]
    assert exchange(server, client, bytearray(data[:size])) == data[:size]  # type: ignore[arg-type]
    assert exchange(client, server, memoryview(data)[:size]) == data[:size]  # type: ignore[arg-type]


def test_bytes_are_encrypted_where_they_stand(kind: type[TlsConnection]) -> None:
    client, server = joined(kind)
    buffer = IoBuffer(100_000, headroom=9)
    buffer.array[:9] = b"123456789"
    buffer.body[:] = b"x" * 100_000
    client.write_from(buffer, 0, 9 + 100_000)
    wire = IoBuffer(65_536)
    plain = IoBuffer(40_000)
    got = bytearray()
    while nbytes := client.data_to_send_into(wire):
        server.receive_from(wire, nbytes)
        while read_bytes := server.read_into(plain, 1000, 5000):
            assert read_bytes <= 5000
            got += plain.view[1000 : 1000 + read_bytes]
    assert got == buffer.array


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 200_000), st.booleans()), min_size=1, max_size=12))
def test_nothing_of_a_buffer_is_needed_once_it_was_read(pieces: list[tuple[int, bool]]) -> None:
    sent = random.Random(1).randbytes(400_000)
    for kind in KINDS:
        client, server = joined(kind)
        client.write(sent)
        wire, buffer, got = take(client), IoBuffer(256 * 1024), b""
        for nbytes, whole in [*pieces, *[(200_000, True)] * 3]:
            piece, wire = wire[:nbytes], wire[nbytes:]
            if whole:
                buffer.view[: len(piece)] = piece
                server.receive_from(buffer, len(piece))
            else:
                server.receive_data(piece)
            got += read(server)
            buffer.view[:] = bytes(buffer.size)
        client.trim()
        server.trim()
        assert got + exchange(client, server, b"last") == sent + b"last"


@pytest.mark.parametrize("nbytes", [20_000, 60_000])
def test_ciphertext_that_was_not_read_in_time_ends_the_connection(nbytes: int) -> None:
    client, server = joined()
    client.write(bytes(60_000))
    wire, buffer = take(client), IoBuffer(256 * 1024)
    buffer.view[: len(wire)] = wire
    server.receive_from(buffer, len(wire))
    with pytest.raises(TlsError, match="before what came earlier was read"):
        server.receive_from(buffer, nbytes)
    with pytest.raises(TlsError, match="before what came earlier was read"):
        server.receive_data(b"x")


def test_writing_nothing_sends_nothing(kind: type[TlsConnection]) -> None:
    client, _ = joined(kind)
    client.write(b"")
    client.receive_data(b"")
    assert take(client) == b""


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=6), st.data())
def test_any_chunking_gives_the_same_bytes(sizes: list[int], data: st.DataObject) -> None:
    for kind in KINDS:
        client, server = joined(kind)
        sent = b"".join(bytes([number]) * size for number, size in enumerate(sizes))
        for number, size in enumerate(sizes):
            client.write(bytes([number]) * size)
        wire = take(client)
        got = b""
        while wire:
            step = data.draw(st.integers(1, len(wire)))
            server.receive_data(wire[:step])
            wire = wire[step:]
            got += read(server)
        assert got == sent


def test_a_buffer_may_be_emptied_right_after_it_was_written() -> None:
    client, server = joined()
    queue = bytearray(b"abc")
    client.write(queue)
    queue.clear()
    server.receive_data(take(client))
    assert read(server) == b"abc"


def test_somebody_elses_openssl_error_is_not_ours() -> None:
    client, server = joined()
    lib = hbone.openssl.lib
    assert lib.BIO_new_file(b"/nonexistent/file", b"r") == hbone.openssl.ffi.NULL
    assert lib.ERR_peek_error() != 0
    assert read(server) == b""
    assert exchange(client, server, b"x") == b"x"


def test_trimming_an_idle_connection_keeps_it_working(kind: type[TlsConnection]) -> None:
    client, server = joined(kind)
    assert len(exchange(client, server, b"x" * 200_000)) == 200_000
    client.trim()
    server.trim()
    assert exchange(client, server, b"x") == b"x"
    assert exchange(server, client, b"y") == b"y"


def allocated() -> int:
    """Bytes that malloc has given out, which glibc tells."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("the C library does not tell")
    mallinfo.restype = MallInfo
    found: int = mallinfo().used
    return found


def given_back(nbytes: int) -> int:
    """What 40 ends give back when they are trimmed after `nbytes` each way."""
    pairs = [joined() for _ in range(20)]
    for client, server in pairs:
        exchange(client, server, b"x" * nbytes)
        exchange(server, client, b"x" * nbytes)
    before = allocated()
    for client, server in pairs:
        client.trim()
        server.trim()
    return before - allocated()


def test_an_idle_connection_keeps_no_buffers() -> None:
    # Of each of the 40 ends 17 KiB that records were read into, and what the two queues of ciphertext had grown to.
    assert given_back(20_000) > 40 * 40_000


def test_an_idle_connection_is_small() -> None:
    kept = [joined()]  # what is made once
    before = allocated()
    for _ in range(20):
        kept.append(joined())
        for end in kept[-1]:
            end.trim()
    # 35 kB, of which the keys of the exchange are 8, the two record layers 11, OpenSSL's connection itself 7.
    assert (allocated() - before) / 40 < 42_000


def test_only_bulk_has_a_buffer_to_read_into_kept() -> None:
    assert 0 < given_back(10) < 40 * 10_000  # what the handshake had in the queues, and not 17 KiB more


def test_trimming_loses_no_byte(kind: type[TlsConnection]) -> None:
    client, server = joined(kind)
    client.write(b"abc")
    client.trim()
    wire = take(client)
    server.receive_data(wire[:10])
    server.trim()
    assert read(server) == b""
    server.trim()
    server.receive_data(wire[10:])
    assert read(server) == b"abc"


# The end


def test_close_notify_is_told_from_a_cut(kind: type[TlsConnection]) -> None:
    client, server = joined(kind)
    client.write(b"last words")
    client.shutdown()
    client.shutdown()
    server.receive_data(take(client))
    told = [server.closed_by_peer]
    assert read(server) == b"last words"
    told.append(server.closed_by_peer)
    assert told == [False, True]
    server.receive_eof()
    assert not server.lost
    assert exchange(server, client, b"the other way goes on") == b"the other way goes on"
    client.receive_eof()
    assert client.lost
    assert not client.closed_by_peer


@pytest.mark.parametrize(
    ("records", "limit", "expected"),
    [
        ([5, 7], 1 << 18, [12]),
        ([16_384] * 3, 16_384, [16_384] * 3),
        ([16_384] * 3, 2 * 16_384 - 1, [16_384] * 3),
        ([16_384] * 3, 2 * 16_384, [32_768, 16_384]),
        ([16_384, 10], 10_000, [10_000, 6_384, 10]),
    ],
)
@pytest.mark.parametrize("end", ["", "close_notify", "cut record"])
def test_one_read_gives_as_many_records_as_fit(
    kind: type[TlsConnection], records: list[int], limit: int, expected: list[int], end: str
) -> None:
    client, server = joined(kind)
    data = bytearray()
    for size in records:
        client.write(bytes(size))
        data += take(client)
    if end == "close_notify":
        client.shutdown()
        data += take(client)
    elif end:
        client.write(bytes(100))
        data += take(client)[:-1]
    server.receive_data(data)
    buffer = IoBuffer(1 << 18)
    sizes = list(iter(lambda: server.read_into(buffer, 0, limit), 0))
    assert sum(sizes) == sum(records)
    if kind is not PortableTlsConnection:
        assert sizes == expected
    assert server.closed_by_peer is (end == "close_notify")


def test_close_notify_behind_data_behind_a_record_without_data_is_seen(kind: type[TlsConnection]) -> None:
    raw, server = raw_and_server(kind)
    alert = 21
    server.receive_data(raw.key_update() + raw.record(b"last words") + raw.record(b"\x01\x00", alert))
    assert read(server) == b"last words"
    assert server.closed_by_peer


def test_nothing_can_be_written_before_the_handshake_or_after_the_shutdown(kind: type[TlsConnection]) -> None:
    client, _ = ends(kind)
    with pytest.raises(TlsError, match="before the TLS handshake"):
        client.write(b"x")
    client, _ = joined(kind)
    client.shutdown()
    with pytest.raises(TlsError, match="shut down"):
        client.write(b"x")
    with pytest.raises(TlsError, match="shut down"):
        client.write_from(IoBuffer(10), 0, 10)


def test_a_broken_record_ends_the_connection_with_an_alert(kind: type[TlsConnection]) -> None:
    client, server = joined(kind)
    client.write(b"x" * 100)
    wire = bytearray(take(client))
    wire[50] ^= 1
    server.receive_data(wire)
    for _ in range(2):
        with pytest.raises(TlsError, match="connection broke"):
            read(server)
    client.receive_data(take(server))
    with pytest.raises(TlsError, match="bad record mac"):
        read(client)
    with pytest.raises(TlsError):
        server.write(b"x")


GREETINGS = [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(64), b"\xff" * 600]


@pytest.mark.parametrize("greeting", GREETINGS)
@pytest.mark.parametrize("end", ["client", "server"])
def test_a_peer_that_speaks_no_tls_is_an_error(kind: type[TlsConnection], end: str, greeting: bytes) -> None:
    client, server = ends(kind)
    one = client if end == "client" else server
    one.handshake()
    one.receive_data(greeting)
    with pytest.raises(TlsError) as caught:
        one.handshake()
    assert "\n" not in str(caught.value)
    with pytest.raises(TlsError):
        one.handshake()


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.integers(0, 400), st.sampled_from(KINDS), st.booleans())
def test_any_bytes_at_any_time_raise_nothing_but_tls_error(
    junk: bytes, at: int, kind: type[TlsConnection], to_server: bool
) -> None:
    client, server = ends(kind)
    client.handshake()
    hello = take(client)
    target = server if to_server else client
    if to_server:
        target.receive_data(hello[:at])
    else:
        server.receive_data(hello)
        server.handshake()
        target.receive_data(take(server)[:at])
    target.receive_data(junk)
    try:
        if target.handshake():
            read(target)
    except TlsError:
        take(target)


# Floods


def raw_and_server(kind: type[TlsConnection]) -> tuple[RawClient, TlsConnection]:
    server = ends(kind)[1]
    raw = RawClient(raw_context(CLIENT, alpn=[b"h2"]))
    raw.join(server)
    return raw, server


def count_fed(server: TlsConnection, records: list[bytes], *, at_once: bool) -> int:
    """How many of `records` the server worked through before it cut the connection."""
    if at_once:
        server.receive_data(b"".join(records))
        with pytest.raises(TlsError, match=r"without data|broke"):
            read(server)
        left = (
            len(server._ciphertext)
            if isinstance(server, PortableTlsConnection)
            else hbone.openssl.pending(server._into, hbone.openssl.NOWHERE)
        )
        return len(records) - left // len(records[0])
    for number, record in enumerate(records, start=1):
        server.receive_data(record)
        try:
            assert read(server) == b""
        except TlsError:
            return number
    return len(records)


@pytest.mark.parametrize("at_once", [True, False], ids=["in one read", "one by one"])
@pytest.mark.parametrize("requested", [True, False], ids=["answered", "not answered"])
def test_a_flood_of_key_updates_is_cut(kind: type[TlsConnection], at_once: bool, requested: bool) -> None:
    raw, server = raw_and_server(kind)
    records = [raw.key_update(requested=requested) for _ in range(1000)]
    assert count_fed(server, records, at_once=at_once) <= MAX_READS_WITHOUT_DATA
    assert len(take(server)) < 5000


@pytest.mark.parametrize("at_once", [True, False], ids=["in one read", "one by one"])
def test_a_flood_of_empty_records_is_cut(kind: type[TlsConnection], at_once: bool) -> None:
    raw, server = raw_and_server(kind)
    records = [raw.record(b"") for _ in range(1000)]
    assert count_fed(server, records, at_once=at_once) <= MAX_READS_WITHOUT_DATA


def test_padding_without_data_is_cut_as_well(kind: type[TlsConnection]) -> None:
    raw, server = raw_and_server(kind)
    records = [raw.record(b"", padding=100) for _ in range(1000)]
    assert count_fed(server, records, at_once=True) <= MAX_READS_WITHOUT_DATA


def test_key_updates_with_data_between_them_are_fine(kind: type[TlsConnection]) -> None:
    raw, server = raw_and_server(kind)
    for number in range(200):
        server.receive_data(raw.key_update(requested=number % 2 == 0) + raw.record(b"x"))
        assert read(server) == b"x"
        take(server)


def test_a_few_key_updates_in_a_row_are_fine(kind: type[TlsConnection]) -> None:
    raw, server = raw_and_server(kind)
    server.receive_data(b"".join(raw.key_update() for _ in range(MAX_READS_WITHOUT_DATA - 1)) + raw.record(b"x"))
    assert read(server) == b"x"


def test_a_record_that_comes_byte_by_byte_is_no_flood(kind: type[TlsConnection]) -> None:
    raw, server = raw_and_server(kind)
    wire = raw.record(b"x" * 1000)
    got = b""
    for position in range(len(wire)):
        server.receive_data(wire[position : position + 1])
        got += read(server)
    assert got == b"x" * 1000


# Without the handles


@pytest.mark.parametrize("missing", ["SSL_read", "BIO_write", "SSL_clear_mode", "X509_STORE_CTX_get_error"])
def test_a_missing_function_is_noticed(missing: str) -> None:
    class Library:
        def __getattr__(self, name: str) -> object:
            if name == missing:
                raise AttributeError(name)
            return getattr(hbone.openssl.lib, name)

    connection = SSL.Connection(raw_context(), None)
    assert hbone.openssl.has_everything(hbone.openssl.lib, connection)
    assert not hbone.openssl.has_everything(Library(), connection)


def test_a_missing_handle_is_noticed() -> None:
    assert not hbone.openssl.has_everything(hbone.openssl.lib, object())


def test_contexts_are_made_once_per_identity_and_set_of_lists() -> None:
    first, second = RevocationLists([CA.crl()]), RevocationLists([CA.crl()])
    identity = CA.identity("shop", "web")
    for make in (TlsContext.client, TlsContext.server):
        context = make(identity, crls=first)
        assert make(identity, crls=first) is context
        assert make(identity) is not context
        assert make(identity, crls=first) is context
        assert make(identity, crls=RevocationLists()) is make(identity)
        assert make(identity, crls=second) is not context


def test_a_revocation_is_an_error_of_its_own() -> None:
    server = TlsConnection(TlsContext.server(SERVER, crls=RevocationLists([CA.crl(CLIENT.svid.leaf)])), server=True)
    _, at_server = join(TlsConnection(TlsContext.client(CLIENT), server=False), server)
    assert isinstance(at_server, PeerRevokedError)
    wrong = TlsConnection(TlsContext.server(TestCa().identity("shop", "web"), crls=[CA.crl()]), server=True)
    _, at_server = join(TlsConnection(TlsContext.client(CLIENT), server=False), wrong)
    assert not isinstance(at_server, PeerRevokedError)
