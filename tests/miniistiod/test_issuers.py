"""Tokens of other issuers: whose are believed, and whom they stand for."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hmac
import json
import re
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc.jwk import ECKey, OctKey
from tests.support.callers import certificate, discovery, refusal
from tests.support.jwks import ISSUER, NOW, Server, Signer, ed25519, rsa, serving
from tests.support.miniistiod import bearer, control_plane
from tests.support.sizes import size

from hbone.errors import ConfigurationError
from hbone.grpc import StatusCode
from miniistiod import ca, jwks
from miniistiod import issuers as module
from miniistiod.issuers import Issuers, read_issuers
from miniistiod.jwks import Discovered, Jwks, KeysError, parse_keys
from miniistiod.tokens import BadToken

SIGNER = Signer()
BASIC = f"issuers: [{{issuer: '{ISSUER}', audiences: [istio-ca, other], jwksFile: keys.json"


def load(tmp_path: Path, text: str = BASIC + "}]", keys: str | None = None) -> Issuers:
    (tmp_path / "keys.json").write_text(SIGNER.jwks() if keys is None else keys)
    (tmp_path / "issuers.yaml").write_text(text)
    return read_issuers(tmp_path / "issuers.yaml")


@pytest.fixture
def issuers(tmp_path: Path) -> Issuers:
    return load(tmp_path)


def test_a_token_stands_for_its_subject(issuers: Issuers) -> None:
    assert issuers.verify(SIGNER.token(), NOW) == (ISSUER, "shop", "orders", NOW - 10)
    assert issuers.verify(SIGNER.token(aud="other"), NOW)


@pytest.mark.parametrize("key", [rsa(), ed25519(), ECKey.generate_key("P-256")], ids=["RS256", "EdDSA", "ES256"])
def test_signatures_of_every_kind(tmp_path: Path, key: Any) -> None:
    signer = Signer(key)
    found = load(tmp_path, keys=signer.jwks()).verify(signer.token(), NOW)
    assert found[1:3] == ("shop", "orders")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"iss": "https://idp.example.com/"}, "which is not configured"),
        ({"iss": None}, "which is not configured"),
        ({"iss": ["https://idp.example.com"]}, "which is not configured"),
        ({"aud": "istio"}, "for another audience"),
        ({"aud": None}, "for another audience"),
        ({"aud": []}, "for another audience"),
        ({"aud": [["istio-ca"]]}, "for another audience"),
        ({"aud": {"istio-ca": 1}}, "for another audience"),
        ({"exp": None}, "without an end"),
        ({"exp": int(NOW) - 61}, "has expired"),
        ({"exp": "soon"}, "exp is no time"),
        ({"exp": True}, "exp is no time"),
        ({"exp": 10**300}, "exp is no time"),
        ({"nbf": int(NOW) + 61}, "from the future"),
        ({"iat": int(NOW) + 61}, "from the future"),
        ({"sub": None}, "whose sub is not"),
        ({"sub": "orders"}, "whose sub is not"),
        ({"sub": "system:serviceaccount:shop"}, "whose sub is not"),
        ({"sub": "system:serviceaccount:shop:orders:x"}, "whose sub is not"),
        ({"sub": "system:serviceaccount:SHOP:orders"}, "name no namespace"),
        ({"sub": "system:serviceaccount:shop:a/b"}, "name no namespace"),
        ({"sub": "system:serviceaccount::orders"}, "name no namespace"),
    ],
)
def test_claims_that_prove_nothing(issuers: Issuers, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(BadToken, match=why):
        issuers.verify(SIGNER.token(**fields), NOW)


def test_clocks_may_differ_by_a_minute(issuers: Issuers) -> None:
    assert issuers.verify(SIGNER.token(exp=int(NOW) - 59, nbf=int(NOW) + 59, iat=int(NOW) + 59), NOW)


def test_a_token_without_a_time_of_issue_counts_as_old(issuers: Issuers) -> None:
    assert issuers.verify(SIGNER.token(iat=None), NOW)[3] == 0.0


def test_a_stranger_with_the_same_key_id_is_refused(issuers: Issuers) -> None:
    stranger = Signer(ECKey.generate_key("P-256", {"kid": "one"}))
    with pytest.raises(BadToken, match="none of the keys"):
        issuers.verify(stranger.token(), NOW)


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_a_token_without_signature_is_refused(issuers: Issuers) -> None:
    body = part({"iss": ISSUER, "aud": "istio-ca", "exp": NOW + 60, "sub": "system:serviceaccount:shop:orders"})
    for header in ({"alg": "none"}, {"alg": "None"}, {}, {"alg": ["ES256"]}, {"alg": "ES256"}):
        with pytest.raises(BadToken):
            issuers.verify(f"{part(header)}.{body}.", NOW)


def test_a_public_key_is_not_taken_for_a_shared_secret(issuers: Issuers) -> None:
    body = SIGNER.token().split(".")[1]
    head = f"{part({'alg': 'HS256', 'kid': 'one'})}.{body}"
    mac = hmac.digest(SIGNER.keys[0].as_pem(private=False), head.encode(), "sha256")
    with pytest.raises(BadToken, match="signed by 'HS256'"):
        issuers.verify(f"{head}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}", NOW)


def test_a_header_that_demands_something_is_refused(issuers: Issuers) -> None:
    _, body, signature = SIGNER.token().split(".")
    for more in ({"crit": ["exp"]}, {"b64": False}, {"kid": 5}):
        with pytest.raises(BadToken):
            issuers.verify(f"{part({'alg': 'ES256', **more})}.{body}.{signature}", NOW)


@pytest.mark.parametrize("text", ["", ".", "a.b.c", "é.é.é", "eyJ.eyJ.eyJ", "x" * 20_000, "e30.e30.e30", "W10.W10.W10"])
def test_what_is_no_token_is_refused(issuers: Issuers, text: str) -> None:
    with pytest.raises(BadToken) as caught:
        issuers.verify(text, NOW)
    assert len(str(caught.value)) < 300


@settings(max_examples=size(3000, 150), deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=200), st.binary(max_size=80), st.integers(0, 3))
def test_any_bytes_are_an_error_and_no_more(header: bytes, body: bytes, signature: bytes, keep: int) -> None:
    parts = SIGNER.token().split(".")
    fresh = [base64.urlsafe_b64encode(item).rstrip(b"=").decode() for item in (header, body, signature)]
    text = ".".join(parts[number] if number < keep else fresh[number] for number in range(3))
    verifier = Issuers([module.Issuer(issuer=ISSUER, audiences=frozenset(["istio-ca"]), keys=_keys())])
    try:
        verifier.verify(text, NOW)
    except BadToken:
        return
    assert keep == 3


def _keys() -> Jwks:
    keys = Jwks("http://127.0.0.1:9/")
    keys._keys, keys._good, keys._tried = parse_keys(SIGNER.jwks().encode()), time.monotonic(), time.monotonic()
    return keys


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=size(2000, 100), deadline=None)
@given(st.dictionaries(st.sampled_from(["iss", "aud", "exp", "nbf", "iat", "sub"]), JSON))
def test_any_claims_are_an_error_and_no_more(claims: dict[str, Any]) -> None:
    verifier = Issuers([module.Issuer(issuer=ISSUER, audiences=frozenset(["istio-ca"]), keys=_keys())])
    body = {"iss": ISSUER, "aud": "istio-ca", **claims}
    try:
        token = f"{part({'alg': 'ES256', 'kid': 'one'})}.{part(body)}."
        verifier._check_signature = lambda *_: None  # type: ignore[method-assign]  # what a mistaken issuer could sign
        verifier.verify(token, NOW)
    except BadToken:
        return


# -- mapping


@pytest.mark.parametrize(
    ("mapping", "claims", "found"),
    [
        ("namespace: {claim: team}, serviceAccount: {claim: app}", {"team": "ci", "app": "runner"}, ("ci", "runner")),
        ("namespace: {value: ci}, serviceAccount: {claim: app}", {"app": "runner"}, ("ci", "runner")),
        (
            "namespace: {claim: [k8s.io, ns]}, serviceAccount: {claim: [k8s.io, sa, name]}",
            {"k8s.io": {"ns": "ci", "sa": {"name": "runner"}}},
            ("ci", "runner"),
        ),
    ],
)
def test_claims_are_mapped(tmp_path: Path, mapping: str, claims: dict[str, Any], found: tuple[str, str]) -> None:
    issuers = load(tmp_path, f"{BASIC}, {mapping}}}]")
    assert issuers.verify(SIGNER.token(**claims), NOW)[1:3] == found
    for wrong in (
        {},
        {"team": 5, "app": 5},
        {"team": "", "app": ""},
        {"team": ["ci"], "app": {"x": 1}},
        {"k8s.io": "x"},
    ):
        with pytest.raises(BadToken):
            issuers.verify(SIGNER.token(**wrong), NOW)


def test_an_issuer_speaks_for_the_namespaces_that_it_was_given(tmp_path: Path) -> None:
    issuers = load(tmp_path, f"{BASIC}, namespaces: [ci]}}]")
    assert issuers.verify(SIGNER.token(sub="system:serviceaccount:ci:runner"), NOW)
    with pytest.raises(BadToken, match="for which its issuer does not speak"):
        issuers.verify(SIGNER.token(), NOW)


# -- keys


def test_keys_that_cannot_verify_are_passed_over() -> None:
    signer, other = Signer(), ECKey.generate_key("P-256", {"kid": "enc", "use": "enc"})
    keys = json.loads(signer.jwks())["keys"]
    keys += [
        other.as_dict(private=False),
        OctKey.generate_key(256).as_dict(),
        {"kty": "unknown"},
        {"kty": "EC"},
        {"kty": "EC", "crv": "P-256", "x": 1, "y": []},
        {**keys[0], "kid": "ops", "key_ops": ["sign"]},
        5,
        None,
    ]
    assert [key.kid for key in parse_keys(json.dumps({"keys": keys}).encode())] == ["one"]


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "{}", '{"keys": {}}', '{"keys": []}', '{"keys": [{"kty": "oct", "k": "eA"}]}', "[" * 5000]
)
def test_what_is_no_set_of_keys_is_refused(text: str) -> None:
    with pytest.raises(KeysError):
        parse_keys(text.encode())


@settings(max_examples=size(1000, 50), deadline=None)
@given(
    JSON
    | st.fixed_dictionaries(
        {
            "keys": st.lists(
                st.dictionaries(
                    st.sampled_from(["kty", "crv", "x", "y", "n", "e", "kid", "use", "alg"]),
                    JSON | st.sampled_from(["EC", "RSA", "OKP", "P-256"]),
                )
            )
        }
    )
)
def test_any_set_of_keys_is_an_error_and_no_more(value: Any) -> None:
    try:
        parse_keys(json.dumps(value).encode())
    except KeysError:
        pass


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path) -> None:
    issuers, fresh = load(tmp_path), Signer(rsa("two"))
    path = tmp_path / "keys.json"
    path.write_text(fresh.jwks())
    assert issuers.verify(fresh.token(), NOW)
    with pytest.raises(BadToken):
        issuers.verify(SIGNER.token(), NOW)
    path.write_text("nonsense")
    assert issuers.verify(fresh.token(), NOW)  # the last good ones
    path.unlink()
    assert issuers.verify(fresh.token(), NOW)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_keys_are_fetched_kept_and_fetched_again() -> None:
    clock = Clock()
    with serving(SIGNER.jwks()) as server:
        keys = Jwks(server.url, monotonic=clock)
        for _ in range(3):
            assert [key.kid for key in keys.keys("one")] == ["one"]
        assert server.calls == 1
        clock.now += jwks.REFRESH
        keys.keys("one")
        assert server.calls == 2
        fresh = Signer(rsa("two"))
        server.body = fresh.jwks()
        assert keys.keys("two") == []  # not before half a minute is over
        clock.now += jwks.RETRY
        assert [key.kid for key in keys.keys("two")] == ["two"]
        assert server.calls == 3
        for number in range(50):
            assert keys.keys(f"nonsense {number}") == []
        assert server.calls == 3


def test_keys_are_used_for_a_day_while_they_cannot_be_fetched() -> None:
    clock = Clock()
    with serving(SIGNER.jwks()) as server:
        keys = Jwks(server.url, monotonic=clock)
        keys.keys("one")
        server.status = 500
        clock.now += jwks.STALE
        assert keys.keys("one")
        clock.now += 1
        with pytest.raises(KeysError, match="cannot be fetched"):
            keys.keys("one")
        server.status = 200
        clock.now += jwks.RETRY
        assert keys.keys("one")


@pytest.mark.parametrize(("status", "body"), [(302, ""), (404, ""), (200, "x"), (200, " " * (1 << 21))])
def test_answers_that_are_no_keys(status: int, body: str) -> None:
    with serving(body) as server:
        server.status = status
        with pytest.raises(KeysError):
            Jwks(server.url).keys(None)
        assert server.calls == 1


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n"])
def test_a_server_that_drips_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, begin: bytes
) -> None:
    monkeypatch.setattr(jwks, "FETCH_SECONDS", 0.1)
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(begin)
            with contextlib.suppress(OSError):
                while not ended.wait(0.01):  # each byte within the timeout of a read
                    connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        with pytest.raises(KeysError):
            Jwks(f"http://127.0.0.1:{listener.getsockname()[1]}/").keys("one")
        ended.set()
        thread.join()
    assert "it takes longer than 0.2 s" in caplog.text


def test_a_server_of_keys_proves_itself_by_the_roots_that_were_named(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    root, other = ca.make_root("idp", now), ca.make_root("other", now)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = ca.issue_server(root, key.public_key(), ["127.0.0.1"], now, datetime.timedelta(hours=1))
    (tmp_path / "server.pem").write_bytes(ca.certificate_pem(leaf).encode() + ca.Signer(leaf, key).key_pem())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    for name, signer in (("root.pem", root), ("other.pem", other)):
        (tmp_path / name).write_text(ca.certificate_pem(signer.certificate))
    with serving(SIGNER.jwks(), context) as server:
        assert Jwks(server.url, tmp_path / "root.pem").keys("one")
        for roots in (tmp_path / "other.pem", None):
            with pytest.raises(KeysError):
                Jwks(server.url, roots).keys("one")
        assert server.calls == 1


def test_a_server_that_is_away() -> None:
    with pytest.raises(KeysError):
        Jwks("http://127.0.0.1:9/").keys("one")


# -- an issuer that names the place of its keys

WELL_KNOWN = "/.well-known/openid-configuration"


def describe(server: Server, **fields: Any) -> str:
    """Have a server describe itself as an issuer; the issuer's name."""
    issuer = server.url.rstrip("/")
    server.pages[WELL_KNOWN] = json.dumps({"issuer": issuer, "jwks_uri": f"{issuer}/keys", **fields})
    return issuer


def test_an_issuer_is_asked_for_the_place_of_its_keys(tmp_path: Path) -> None:
    with serving("") as server:
        issuer = describe(server)
        server.pages["/keys"] = SIGNER.jwks()
        (tmp_path / "issuers.yaml").write_text(f"issuers: [{{issuer: '{issuer}', audiences: [istio-ca]}}]")
        issuers = read_issuers(tmp_path / "issuers.yaml")
        assert server.asked == []  # it may come up later
        for _ in range(3):
            assert issuers.verify(SIGNER.token(iss=issuer), NOW)[:3] == (issuer, "shop", "orders")
        assert server.asked == [WELL_KNOWN, "/keys"]
        with pytest.raises(BadToken):
            issuers.verify(SIGNER.token(iss=f"{issuer}/"), NOW)


def test_a_key_that_is_not_known_is_looked_for_where_the_issuer_says_now() -> None:
    clock, fresh = Clock(), Signer(rsa("two"))
    with serving("") as server:
        issuer = describe(server)
        server.pages["/keys"], server.pages["/new"] = SIGNER.jwks(), fresh.jwks()
        keys = Jwks(Discovered(issuer), monotonic=clock)
        assert keys.keys("one")
        describe(server, jwks_uri=f"{issuer}/new")
        for number in range(50):
            assert keys.keys(f"nonsense {number}") == []
        assert server.calls == 2
        clock.now += jwks.RETRY
        assert keys.keys("two")
        assert server.asked[2:] == [WELL_KNOWN, "/new"]


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("", "no description"),
        ("[]", "no description"),
        ("[" * 5000, "no description"),
        ('{"issuer": "https://idp.example.com"}', "names no jwks_uri"),
        ('{"issuer": "https://idp.example.com", "jwks_uri": 5}', "names no jwks_uri"),
        ('{"issuer": "https://idp.example.com/", "jwks_uri": "https://x/"}', "describes the issuer"),
        ('{"issuer": ["https://idp.example.com"], "jwks_uri": "https://x/"}', "describes the issuer"),
        ('{"jwks_uri": "https://x/"}', "describes the issuer None"),
        ('{"issuer": "https://idp.example.com", "jwks_uri": "http://x/"}', "https:// only"),
        ('{"issuer": "https://idp.example.com", "jwks_uri": "http://127.0.0.1:15014/"}', "https:// only"),
        ('{"issuer": "https://idp.example.com", "jwks_uri": "file:///etc/shadow"}', "is no URL"),
        ('{"issuer": "https://idp.example.com", "jwks_uri": "https://x/\\r\\nhost: y"}', "is no URL"),
        ('{"issuer": "https://idp.example.com", "jwks_uri": "https://x:port/"}', "is no URL"),
    ],
)
def test_what_an_issuer_must_not_say_of_itself(page: str, why: str) -> None:
    with pytest.raises(KeysError, match=why):
        Discovered(ISSUER).place(page.encode())


@pytest.mark.parametrize("issuer", [ISSUER, f"{ISSUER}/", f"{ISSUER}/realms/a"])
def test_an_issuer_describes_itself_below_its_name(issuer: str) -> None:
    found = Discovered(issuer)
    assert found.url == f"{issuer.rstrip('/')}{WELL_KNOWN}"
    assert found.place(json.dumps({"issuer": issuer, "jwks_uri": "https://keys.example.com/k"}).encode()) == (
        "https://keys.example.com/k"
    )


@pytest.mark.parametrize(("status", "page"), [(302, ""), (500, ""), (200, "x"), (200, " " * (1 << 21))])
def test_an_issuer_that_does_not_describe_itself_is_told_and_left_alone(status: int, page: str) -> None:
    with serving("") as server:
        issuer = describe(server)
        server.pages[WELL_KNOWN] = page
        server.status = status
        keys = Jwks(Discovered(issuer))
        for _ in range(3):
            with pytest.raises(KeysError, match=f"{WELL_KNOWN} cannot be fetched; the log says why"):
                keys.keys("one")
        assert server.calls == 1


@settings(max_examples=size(1000, 50), deadline=None)
@given(JSON | st.dictionaries(st.just("jwks_uri"), JSON | st.text().map("https://{}".format)))
def test_any_description_is_a_place_or_an_error(value: Any) -> None:
    if isinstance(value, dict):
        value = {**value, "issuer": ISSUER}
    try:
        assert Discovered(ISSUER).place(json.dumps(value).encode()).startswith("https://")
    except KeysError:
        pass


# -- the file


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the file must be a mapping"),
        ("x: [", "cannot be parsed as YAML"),
        ("issuers: []", "must have a list 'issuers'"),
        ("issuers: [5]", r"issuers\[0\] must be a mapping"),
        ("issuers: [{}]", r"issuers\[0\].issuer must be a text"),
        ("issuers: [{issuer: a}]", "audiences is missing"),
        ("issuers: [{issuer: a, audiences: [b]}]", "either jwksUri or jwksFile, because its issuer cannot be asked"),
        ("issuers: [{issuer: a, audiences: [b], jwksUri: 'https://x', jwksFile: y}]", "either jwksUri or jwksFile"),
        ("issuers: [{issuer: a, audiences: [b], jwksUri: 'http://example.com/k'}]", "https:// only"),
        ("issuers: [{issuer: 'http://idp.example', audiences: [b]}]", "https:// only"),
        ("issuers: [{issuer: a, audiences: [b], jwksUri: 'file:///etc/passwd'}]", "is no URL"),
        ("issuers: [{issuer: a, audiences: [b], jwksUri: 'https://[x'}]", "is no URL"),
        ("issuers: [{issuer: a, audiences: [b], jwksFile: none.json}]", "cannot be read"),
        ("issuers: [{issuer: a, audiences: [b], jwksUri: 'https://x', caFile: none}]", "caFile cannot be used"),
        ("issuers: [{issuer: a, audiences: [b], jwks: x}]", "has the field 'jwks', which is none"),
        (BASIC + ", namespace: {value: x}}]", "maps only one of"),
        (BASIC + ", namespace: {value: x, claim: y}, serviceAccount: {value: x}}]", "either claim or value"),
        (BASIC + ", namespace: {claim: []}, serviceAccount: {value: x}}]", "must be a name, or a list"),
        (BASIC + "}, {issuer: 'https://idp.example.com', audiences: [b], jwksFile: keys.json}]", "is there twice"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        load(tmp_path, text)


def test_the_file_of_the_readme_is_read(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = (part for part in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "issuers:" in part)
    (tmp_path / "issuers.yaml").write_text(block)
    assert read_issuers(tmp_path / "issuers.yaml")._issuers.keys() == {
        "https://idp.example.com",
        "https://kubernetes.default.svc.cluster.local",
    }


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: no such file"):
        read_issuers(tmp_path / "none.yaml")


# -- in a mesh


async def test_a_token_of_an_issuer_is_good_for_both_services(tmp_path: Path) -> None:
    load(tmp_path)
    now = time.time()
    async with control_plane(tmp_path, issuers=tmp_path / "issuers.yaml") as cp:
        token = bearer(SIGNER.token(now=now))
        identity = await certificate(cp, token)
        assert str(identity.id) == "spiffe://cluster.local/ns/shop/sa/orders"
        async with discovery(cp, None, token) as stream:
            await stream.response()
            cp.store.revoke(time.time(), spiffe_id=str(identity.id))
            assert await stream.ends_with() is StatusCode.UNAUTHENTICATED
        assert (await refusal(cp, token))[0] is StatusCode.UNAUTHENTICATED
        later = bearer(SIGNER.token(now=time.time() + 30))
        assert (await certificate(cp, later)).id == identity.id  # issued after the revocation
        assert (await refusal(cp, bearer(SIGNER.token(now=now, aud="x"))))[0] is StatusCode.UNAUTHENTICATED
        own = bearer(cp.create_token("shop", "web", reusable=True))
        assert (await certificate(cp, own)).id.service_account == "web"


async def test_a_certificate_that_a_token_gave_goes_with_the_token(tmp_path: Path) -> None:
    load(tmp_path)
    async with control_plane(tmp_path, issuers=tmp_path / "issuers.yaml") as cp:
        token = bearer(SIGNER.token(now=time.time()))
        identity = await certificate(cp, token)
        cp.store.revoke(time.time(), serial=f"{identity.svid.serial:032x}")
        assert (await refusal(cp, token))[0] is StatusCode.UNAUTHENTICATED
        assert {item.caller for item in cp.store.certificates(0.0)} == {f"JWT of {ISSUER}"}
