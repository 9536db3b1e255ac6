from __future__ import annotations

import base64
import hashlib
import json

import attrs
import pytest

from ztunnel.wire.token import EnrolmentToken, TokenError, parse_enrolment_token

TOKEN = EnrolmentToken(
    secret="once.abcdefgh12." + "s" * 43,
    root_sha256=bytes(range(32)),
    trust_domain="cluster.local",
    namespace="shop",
    service_account="orders",
    name="orders-1",
)


def packed(fields: object) -> str:
    body = "enrol1." + base64.urlsafe_b64encode(json.dumps(fields).encode()).rstrip(b"=").decode()
    return f"{body}.{hashlib.sha256(body.encode()).hexdigest()[:8]}"


FIELDS = {
    "td": "cluster.local",
    "ns": "shop",
    "sa": "orders",
    "root": base64.urlsafe_b64encode(bytes(32)).rstrip(b"=").decode(),
    "secret": TOKEN.secret,
}


def test_text_form_is_read_back() -> None:
    assert parse_enrolment_token(f"  {TOKEN}\n") == TOKEN
    assert parse_enrolment_token(str(attrs.evolve(TOKEN, name=None))).name is None
    assert TOKEN.spiffe_id == "spiffe://cluster.local/ns/shop/sa/orders"


def test_secret_is_not_in_the_repr() -> None:
    assert "s" * 43 not in repr(TOKEN)


@pytest.mark.parametrize("cut", range(len(str(TOKEN))))
def test_a_token_cut_short_is_refused_without_repeating_it(cut: int) -> None:
    with pytest.raises(TokenError) as caught:
        parse_enrolment_token(str(TOKEN)[:cut])
    assert str(TOKEN)[7:40] not in str(caught.value)


def test_a_reusable_token_is_named_as_such() -> None:
    with pytest.raises(TokenError, match="reusable"):
        parse_enrolment_token("eyJhbGciOiJIUzI1NiJ9.e30.x")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ([], "named texts"),
        ({**FIELDS, "td": 1}, "named texts"),
        ({k: v for k, v in FIELDS.items() if k != "root"}, "lacks root"),
        ({**FIELDS, "more": "x"}, "'more'"),
        ({**FIELDS, "root": "AAAA"}, "3 bytes"),
        ({**FIELDS, "secret": "x"}, "secret"),
        ({**FIELDS, "secret": TOKEN.secret + "\r\nx: y"}, "secret"),
        ({**FIELDS, "ns": "a/b"}, "'ns'"),
        ({**FIELDS, "root": "é"}, "base64"),
    ],
)
def test_wrong_fields_are_refused(fields: object, why: str) -> None:
    with pytest.raises(TokenError, match=why):
        parse_enrolment_token(packed(fields))


def test_an_endless_text_is_refused() -> None:
    with pytest.raises(TokenError, match="4096"):
        parse_enrolment_token("enrol1." + "A" * 5000)
