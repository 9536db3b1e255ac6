from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniistiod.resources import tree
from miniistiod.resources.findings import Findings
from miniistiod.resources.tree import Mapping, Scalar, Sequence, documents


def read(text: str) -> tuple[list[tree.Value], list[str]]:
    findings = Findings("a.yaml")
    return documents(text, findings), [str(item) for item in findings.items]


def test_values_remember_their_line() -> None:
    ((document,), findings) = read("a: 1\nb:\n- x\n- y\n")
    assert not findings
    assert isinstance(document, Mapping)
    line, value = document.items["b"]
    assert line == 2
    assert isinstance(value, Sequence)
    assert [item.line for item in value.items] == [3, 4]


def test_empty_documents_are_left_out() -> None:
    found, findings = read("---\n---\na: 1\n---\n# nothing\n")
    assert len(found) == 1
    assert not findings


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("x", "text"),
        ("'1'", "text"),
        ("2025-01-01", "text"),
        ("=", "text"),
        ("1", "number"),
        ("1.5", "number"),
        ("yes", "true or false"),
        ("~", "nothing"),
        ("!!str 1", "text"),
    ],
)
def test_a_plain_value_is_taken_as_yaml_does(text: str, kind: str) -> None:
    ((document,), _) = read(f"- {text}\n")
    assert isinstance(document, Sequence)
    (value,) = document.items
    assert isinstance(value, Scalar)
    assert value.kind == kind


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml:3: error: the key 'a' is given twice, first on line 1; keep one of them"),
        ("a: [1\n", "a.yaml:2: error: not YAML"),
        ("a: *b\n", "a.yaml:1: error: the alias *b refers to no anchor"),
        ("a: !thing 1\n", "a.yaml:1: error: the tag !thing has no meaning"),
        ("a: !thing [1]\n", "a.yaml:1: error: the tag !thing has no meaning"),
        ("? [a]\n: 1\n", "a list stands where a key is expected"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "a.yaml:3: error: the merge key << is not supported"),
        ("[" * 100, "more than 32 levels"),
        ("[" * 100_000, "more than 32 levels"),
        ("a: b: c\n", "a.yaml:1: error: not YAML"),
        ("\0", "not YAML"),
        ("a: &a [*a]\n", "refers to no anchor"),
    ],
)
def test_what_is_refused_names_its_line(text: str, finding: str) -> None:
    found, findings = read(text)
    assert found == []
    assert finding in findings[0]


def test_aliases_count_as_if_they_were_written_out() -> None:
    levels = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    levels += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    found, findings = read("\n".join(levels))
    assert found == []
    assert "more than 1000000 values" in findings[0]


def test_an_anchor_is_of_its_document_only() -> None:
    _, findings = read("a: &x 1\n---\nb: *x\n")
    assert "refers to no anchor" in findings[0]


def test_a_file_over_the_limit_is_not_parsed() -> None:
    _, findings = read("#" * (tree.MAX_BYTES + 1))
    assert "over the limit" in findings[0]


@given(st.text(max_size=200))
def test_any_text_gives_documents_or_a_finding(text: str) -> None:
    found, findings = read(text)
    assert not (found and findings)


@given(st.text(alphabet="[]{}:,-&*! \n'\"|>a#?%@`", max_size=60))
def test_any_punctuation_gives_documents_or_a_finding(text: str) -> None:
    found, findings = read(text)
    assert not (found and findings)
