from __future__ import annotations

import html.parser
import re

from tests.support.miniistiod import MESH

from miniistiod import overview
from miniistiod.explain import MeshView
from miniistiod.registry import Registry
from miniistiod.resources import load

STATUS = {"status": "ok", "problems": [], "warnings": []}
HOSTILE = "<script>alert(1)</script>\"'&"
PROXY = {
    "node": HOSTILE,
    "identity": "spiffe://cluster.local/ns/shop/sa/web",
    "remote": "10.1.0.2:40000",
    "types": {
        "type.googleapis.com/istio.workload.Address": {"rejected": HOSTILE, "acknowledged": False, "number": 3},
        "type.googleapis.com/istio.security.Authorization": {"rejected": None, "acknowledged": True, "number": 3},
    },
}


def page(text: str = MESH, **status: object) -> str:
    seen = MeshView()
    store = seen.take(seen.news(Registry.of(load({"a.yaml": text})).catalog))
    return overview.render(store, {**STATUS, **status}, [PROXY])


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


def test_it_shows_workloads_services_policies_proxies_and_who_may_talk_to_whom() -> None:
    texts = Outline(page()).texts
    named = ("shop/orders-1", "10.1.0.1", "shop/orders.mesh", "10.9.0.1", "shop/orders")
    for wanted in (*named, "acknowledged 3", "yes", "no"):
        assert wanted in texts, wanted


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
