from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from miniistiod import tokens
from miniistiod.tokens import BadToken, ReusableToken, sign_reusable, split_secret, verify_reusable

KEY = b"k" * 32
TOKEN = ReusableToken(
    id="0123456789ab",
    trust_domain="cluster.local",
    namespace="shop",
    service_account="orders",
    issued=1000,
    expires=2000,
)


def signed(header: Any, claims: Any, key: bytes = KEY) -> str:
    def segment(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).rstrip(b"=").decode()

    body = f"{segment(header)}.{segment(claims)}"
    return f"{body}.{tokens._signature(body, key)}"


HEADER = {"alg": "HS256", "typ": "JWT"}
CLAIMS = {
    "iss": "miniistiod:cluster.local",
    "aud": ["istio-ca"],
    "sub": "system:serviceaccount:shop:orders",
    "iat": 1000,
    "exp": 2000,
    "jti": "0123456789ab",
}


def test_a_reusable_token_says_who_it_stands_for() -> None:
    text = sign_reusable(TOKEN, KEY)
    assert verify_reusable(text, KEY, "cluster.local", 1500.0) == TOKEN
    assert text == signed(HEADER, CLAIMS)
    assert "\n" not in text


def test_a_reusable_token_ends() -> None:
    with pytest.raises(BadToken, match="expired"):
        verify_reusable(sign_reusable(TOKEN, KEY), KEY, "cluster.local", 2000.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "nonsense",
        "é.é.é",
        sign_reusable(TOKEN, b"x" * 32),
        sign_reusable(TOKEN, KEY)[:-1],
        sign_reusable(TOKEN, KEY) + "A",
        sign_reusable(TOKEN, KEY) + "\n",
        signed({"alg": "none", "typ": "JWT"}, CLAIMS),
        signed({"typ": "JWT", "alg": "HS256"}, CLAIMS),
        signed({"alg": "HS256"}, CLAIMS),
        signed(HEADER, CLAIMS).rpartition(".")[0] + ".",
        signed(HEADER, []),
        signed(HEADER, {**CLAIMS, "aud": ["other"]}),
        signed(HEADER, {**CLAIMS, "iss": "miniistiod:elsewhere"}),
        signed(HEADER, {**CLAIMS, "sub": "system:serviceaccount:shop"}),
        signed(HEADER, {**CLAIMS, "sub": "system:serviceaccount:shop:a:b"}),
        signed(HEADER, {**CLAIMS, "sub": "user:x:shop:orders"}),
        signed(HEADER, {**CLAIMS, "exp": "never"}),
        signed(HEADER, {key: value for key, value in CLAIMS.items() if key != "exp"}),
        "A" * 5000,
    ],
)
def test_any_other_text_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(BadToken) as caught:
        verify_reusable(text, KEY, "cluster.local", 1500.0)
    assert len(text) < 20 or text not in str(caught.value)


def test_a_one_time_secret_names_its_id() -> None:
    secret = tokens.new_secret("abc123def456")
    assert split_secret(secret) == "abc123def456"
    assert tokens.new_secret("abc123def456") != secret
    for text in ("", "once.", "once.a", "once..b", "eyJ.a.b", "once.a." + "x" * 5000):
        assert split_secret(text) is None
