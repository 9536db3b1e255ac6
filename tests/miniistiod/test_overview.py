from __future__ import annotations

import html.parser
import re
from pathlib import Path
from typing import Any

import pytest

from miniistiod import overview
from miniistiod.explain import MeshView
from miniistiod.registry import Registry
from miniistiod.resources import load

MESH = (Path(__file__).parents[1] / "data" / "overview.yaml").read_text()
"""Eleven workloads, five services, four policies, a waypoint."""
ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
STATUS = {"status": "ok", "problems": [], "warnings": []}
HOSTILE = "<script>alert(1)</script>\"'&"
PROXY = {
    "node": HOSTILE,
    "identity": "spiffe://cluster.local/ns/shop/sa/web",
    "remote": "10.1.0.2:40000",
    "types": {
        ADDRESS: {"rejected": HOSTILE, "acknowledged": False, "number": 3, "has": 15},
        AUTHORIZATION: {"rejected": None, "acknowledged": True, "number": 3, "has": 6},
    },
}


def page(text: str = MESH, proxy: dict[str, Any] = PROXY, **status: object) -> str:
    seen = MeshView()
    store = seen.take(seen.news(Registry.of(load({"a.yaml": text})).catalog))
    return overview.render(store, {**STATUS, **status}, [proxy], trust_domain="cluster.local", number=3)


def table(text: str, name: str) -> list[list[tuple[str, str]]]:
    """Colour and text of each cell, by row."""
    body = re.search(f'<table id="{name}">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert body is not None
    cells = re.compile(r'<t[dh](?: class="([-\w]+)")?>(.*?)</t[dh]>')
    return [cells.findall(row) for row in body[1].split("</tr>")[:-1]]


class Outline(html.parser.HTMLParser):
    """Tags, attributes and texts as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action") or name[:2] == "on"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_workloads_and_services_are_shown_and_what_is_amiss_stands_out() -> None:
    text = page()
    assert "cluster.local: 11 workloads, 5 services, 5 policies, 1 proxies connected." in text
    workloads = table(text, "workloads")
    assert [cell for _, cell in workloads[0]] == [
        *("data/db-1", "10.1.2.1", "data/sa/db", "plaintext", "healthy", "data/db.mesh")
    ]
    amiss = [(row[0][1], cell) for row in workloads for colour, cell in row if colour]
    assert amiss == [
        *[(name, "plaintext") for name in ("data/db-1", "data/db-2", "shop/mail")],
        ("shop/orders-2", "unhealthy"),
    ]
    services = {row[0][1]: row for row in table(text, "services")}
    assert services["shop/orders.mesh"][3] == ("some", "1 of 2")
    assert services["data/db.mesh"][3] == ("yes", "2 of 2")


def test_who_may_talk_to_whom_says_no_more_than_is_known() -> None:
    rows = {row[0][1]: [cell for _, cell in row[1:]] for row in table(page(), "reachability")}
    free = MESH.replace("labels: {istio.io/use-waypoint: waypoint}", "labels: {}")
    # data/db is reached in plaintext, pay/payments by policy, and before the services of shop stands a waypoint.
    assert rows["shop/sa/orders"] == ["plain", "yes", *["waypoint"] * 4]
    assert rows["shop/sa/web"] == ["plain", "no", *["waypoint"] * 4]
    without = {row[0][1]: [cell for _, cell in row[1:]] for row in table(page(free), "reachability")}
    assert without["shop/sa/web"] == ["plain", "no", "yes", "no", "plain", "yes"]
    assert without["ops/sa/prometheus"] == ["plain", "no", "no", "yes", "plain", "yes"]
    assert "shop/sa/default" not in rows  # a host elsewhere calls nobody


def test_policies_are_told_in_words() -> None:
    assert [[cell for _, cell in row] for row in table(page(), "policies")] == [
        [
            "data/db-clients",
            "DENY",
            "namespace data",
            "not from namespace shop or pay and not from address 10.1.0.0/16",
        ],
        ["istio-system/istio_converted_static_strict", "DENY", "11 workloads", "no identity"],
        ["istio-system/nobody-from-test", "DENY", "all workloads", "from namespace test"],
        ["pay/only-shop", "ALLOW", "namespace pay", "not identity */sa/web and from namespace shop"],
        [
            *("shop/orders", "ALLOW", "2 workloads"),
            "from account shop/web and to port 8080; or identity cluster.local/ns/ops/sa/prometheus and to port 9090",
        ],
    ]


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (None, ("some", "not asked for")),
        ({"rejected": None, "acknowledged": True, "number": 3, "has": 6}, ("yes", "acknowledged 6")),
        ({"rejected": None, "acknowledged": False, "number": 3, "has": 6}, ("some", "sent, not acknowledged yet")),
        ({"rejected": None, "acknowledged": True, "number": 1, "has": 6}, ("some", "changes behind: 2")),
        ({"rejected": "no", "acknowledged": False, "number": 3, "has": 6}, ("no", "rejected: no")),
    ],
)
def test_what_a_proxy_said_is_shown(kind: dict[str, Any] | None, shown: tuple[str, str]) -> None:
    proxy = {**PROXY, "node": "ztunnel~10.1.0.1~web-1.shop~x", "types": {} if kind is None else {ADDRESS: kind}}
    (row,) = table(page(proxy=proxy), "proxies")
    assert row[:3] == [("", "web-1.shop"), ("", "shop/sa/web"), ("", "10.1.0.2:40000")]
    assert row[4] == shown


def test_what_comes_from_elsewhere_is_text_and_nothing_else() -> None:
    outline = Outline(page(warnings=[HOSTILE], problems=[HOSTILE], status="degraded"))
    assert "script" not in outline.tags
    assert outline.links == []
    assert outline.texts.count(HOSTILE) == 3
    assert f"rejected: {HOSTILE}" in outline.texts


def test_it_needs_nothing_from_elsewhere() -> None:
    text = page()
    assert not re.search(r"https?:|url\(|@import|<link|<img", text)
    assert any(value.startswith(b"default-src 'none'") for _, value in overview.HEADERS)


def test_a_large_mesh_is_cut_and_says_so() -> None:
    head = "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n"
    entry = head + "metadata: {{name: w{0}}}\nspec: {{address: 10.2.{1}.{2}}}\n"
    many = "---\n".join(entry.format(number, number // 250, number % 250) for number in range(overview.MAX_ROWS + 7))
    text = page(many)
    assert "and 7 more" in text
    assert text.count("<tr>") < overview.MAX_ROWS + 20
