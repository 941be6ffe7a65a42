"""YAML with lines: against PyYAML's rules where they are right, and YAML 1.2 where they are not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_dn.base.yaml_lines import dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.5e-3", 1.5e-3),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("12", 12),
        ("010", 10),
        ("0x10", 16),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("'5'", "5"),
        ("!!str 5", "5"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"a: {text}").value["a"]
    assert found == value and type(found) is type(value)


def test_nan() -> None:
    assert math.isnan(parse("a: .nan").value["a"])


def test_lines_of_keys_and_items() -> None:
    document = parse("a:\n  b: 1\n  c:\n    - 5\n    - {d: 6}\n")
    assert document.value == {"a": {"b": 1, "c": [5, {"d": 6}]}}
    assert document.lines[("a",)] == 1
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c")] == 3
    assert document.lines[("a", "c", 1, "d")] == 5


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3", 3, "duplicate key 'a'; it was given before on line 1"),
        ("x:\n  a: 1\n  a: 2", 3, "duplicate key 'a'; it was given before on line 2"),
        ("a: &x [*x]", 1, "an alias that contains itself"),
        ("1: x", 1, "the key '1' is not a string"),
        ("? [a]\n: b", 1, "the key 'a list or mapping' is not a string"),
        ("a: !!python/object:os.system x", 1, "the tag 'tag:yaml.org,2002:python/object"),
        ("a: !!int foo", 1, "'foo' is not a int"),
        ("a:\n\tb: 1", 2, "a tab cannot indent"),
        ("a: [1", 1, "not valid YAML"),
        ("a: 1\n---\nb: 2", 2, "not valid YAML"),
        ("a: \x00", 1, "not valid YAML"),
    ],
)
def test_problems_have_lines(text: str, line: int, message: str) -> None:
    ((found, said),) = parse(text).problems
    assert found == line
    assert message in said


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "it has more than 10,000 values, with those that aliases repeat"),
        ("a0: &a0 1\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 900)), "it has more than 10,000 values"),
        ("a: " + "[" * 90_000, "it has too many lists and mappings in each other"),
        ("{a: " * 20_000, "it has too many lists and mappings in each other"),
        ("- " * 30_000, "it has too many lists and mappings in each other"),
        ("? " * 30_000, "it has too many lists and mappings in each other"),
        ("x" * 1_000_000, "it has 1,000,000 characters; at most 100,000 are read"),
        ("- 1\n" * 20_000, "it has more than 10,000 values"),
    ],
)  # fmt: skip
def test_small_texts_that_would_take_for_ever(text: str, message: str) -> None:
    problems = parse(text).problems
    assert any(message in said for _, said in problems), problems[:3]


def test_aliases_that_end_are_read() -> None:
    text = "a: &a [1, 2]\n" + "".join(f"b{i}: *a\n" for i in range(1000))
    document = parse(text)
    assert document.problems == [] and document.value["b999"] == [1, 2]


@pytest.mark.parametrize("text", ['a: "\\ud800"', '"\\udfff": 1', 'a: [x, "b\\udc00\\ud800"]'])
def test_halves_of_surrogate_pairs_are_no_text(text: str) -> None:
    ((line, said),) = parse(text).problems
    assert line == 1 and "is no Unicode text" in said


def test_all_duplicates_are_named() -> None:
    assert len(parse("a: 1\na: 2\nb: 1\nb: 2\nb: 3").problems) == 3


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8)
    | st.sampled_from(["no", "1e-4", "0x1f", "~", "1:30", "=", "<<", ".nan", "- a", "#"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "no", "1e3", "b.*", "null"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_dump_then_parse_is_the_same(value: object) -> None:
    document = parse(dump({"x": value}))
    assert document.problems == []
    assert document.value == {"x": value}
    assert type(document.value["x"]) is type(value)
