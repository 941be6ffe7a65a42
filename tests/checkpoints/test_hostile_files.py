"""Files that were changed in any way give an error of ours or what they held, in little time and memory.

`make test` draws a few changes of each kind, `make test-nightly` thousands.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import RECIPE, Sandbox, make_files
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 10**18, 10**30, -(10**400), 1.5, 1e-300, float("inf"), float("nan")),
    *("", "x", "\0", "\ud800", "1e5", "../x", "x" * 10_000, "[" * 50_000, "\x1b[2J\n"),
    *([], {}, [[]], [None], [1] * 20_000, [{}] * 2_000, {"a": 1}, ["x", 1], [0, 0], [10**18]),
]  # fmt: skip


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("hostile")
    make_files(folder)
    sandbox = Sandbox(folder)
    yield sandbox
    sandbox.close()


def check(sandbox: Sandbox, reader: str, data: bytes, ending: str, good: str | None = None) -> None:
    """Refused, or equal to what the good file of that name holds."""
    outcome, said = sandbox.read(reader, data, ending)
    assert outcome != "died", said
    if outcome == "refused":
        assert len(said) < 20_000, "a message is for people"
    elif good is not None:
        assert outcome == good


def held(sandbox: Sandbox, reader: str, name: str) -> str:
    """What a good file holds."""
    if name not in sandbox.good:
        outcome, said = sandbox.read(
            reader, (sandbox.folder / name).read_bytes(), Path(name).suffix
        )
        assert outcome not in ("refused", "died"), said
        sandbox.good[name] = outcome
    return sandbox.good[name]


# -- how files are changed -----------------------------------------------------------------------


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """One to three changes: flipped bits, other bytes, cut, repeated, cut short."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(start + draw(st.sampled_from([1, 2, 4, 8, 100, 5000])), len(data))
        middle = data[start:end]
        kind = draw(st.sampled_from(["flip", "flip", "flip", "other", "cut", "repeat", "short"]))
        if kind == "flip" and middle:
            middle = bytes([middle[0] ^ (1 << draw(st.integers(0, 7)))]) + middle[1:]
        elif kind == "other":
            middle = draw(st.sampled_from([b"\0", b"\xff", b"9", b"\x80", b"[", b'"'])) * len(
                middle
            )
        elif kind == "cut":
            middle = b""
        elif kind == "repeat":
            middle *= draw(st.sampled_from([2, 3, 50]))
        elif kind == "short":
            end = len(data)
            middle = b""
        data = data[:start] + middle + data[end:]
    return data


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """One value somewhere inside is a nasty one, or gone, or is there twice."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(NASTY))
    value = value.copy()
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    kind = draw(st.sampled_from(["inside"] * 8 + ["gone", "more"]))
    if kind == "gone":
        del value[key]
    elif kind == "more":
        value.insert(key, value[key]) if isinstance(value, list) else value.update(
            {"x": value[key]}
        )
    else:
        value[key] = draw(changed_json(value[key]))
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def changed_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header, or JSON inside it, was changed; without a digest, like old ones."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    del metadata["digest"]
    keys = ["config", "config", "norm_momentum", "info", "constructor", "probe", "probe"]
    inside = draw(st.sampled_from([None, None, *(key for key in keys if key in metadata)]))
    if inside is None:
        header = draw(changed_json(header))
    else:
        metadata[inside] = json.dumps(draw(changed_json(json.loads(metadata[inside]))))
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@st.composite
def changed_recipe(draw: st.DrawFn) -> str:
    """Values, keys and lines that are others, or many."""
    lines = RECIPE.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    key = lines[at].partition(":")[0]
    value = draw(
        st.sampled_from([json.dumps(value) for value in NASTY])
        | st.sampled_from(
            [
                "&a [*a]",
                "*b",
                "!!python/object:os.system x",
                "{" * 2000,
                ".nan",
                "1e400",
                "0x" + "f" * 5000,
            ]
        )
    )
    kind = draw(st.sampled_from(["value", "value", "inside", "key", "twice", "gone", "deep"]))
    if kind == "value":
        lines[at] = f"{key}: {value}"
    elif kind == "inside":
        words = lines[at].split(" ")
        words[draw(st.integers(0, len(words) - 1))] = value
        lines[at] = " ".join(words)
    elif kind == "key":
        lines[at] = f"{value}: 1"
    elif kind == "twice":
        lines[at : at + 1] = [lines[at]] * draw(st.sampled_from([2, 1000]))
    elif kind == "gone":
        del lines[at]
    else:
        lines.insert(
            at, draw(st.sampled_from(["- ", "? ", "[", "{a: "])) * draw(st.sampled_from([30, 3000]))
        )
    return "\n".join(lines)


# -- what comes of it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["net.safetensors", "light.safetensors", "other.safetensors", "net.pt", "script.pt"]
)
@given(data=st.data())
def test_changed_bytes_of_checkpoints(sandbox: Sandbox, name: str, data: st.DataObject) -> None:
    """Each holds a digest, or checksums."""
    good = held(sandbox, "checkpoint", name)
    given = data.draw(changed_bytes((sandbox.folder / name).read_bytes()))
    check(sandbox, "checkpoint", given, Path(name).suffix, good)


@given(data=st.data())
def test_changed_bytes_of_old_checkpoints(sandbox: Sandbox, data: st.DataObject) -> None:
    """Nothing in them tells that a weight is another one; a net comes of it, or an error."""
    given = data.draw(changed_bytes((sandbox.folder / "legacy.pt").read_bytes()))
    check(sandbox, "checkpoint", given, ".pt")


@pytest.mark.parametrize("name", ["net.safetensors", "light.safetensors", "other.safetensors"])
@given(data=st.data())
def test_changed_headers_of_checkpoints(sandbox: Sandbox, name: str, data: st.DataObject) -> None:
    given = data.draw(changed_header((sandbox.folder / name).read_bytes()))
    check(sandbox, "checkpoint", given, ".safetensors")


@pytest.mark.parametrize(
    ("reader", "name"),
    [("plan", "plan.json"), ("sensitivity", "sensitivity.json"), ("metrics", "metrics.json")],
)
@given(data=st.data())
def test_changed_plans_ratios_and_metrics(
    sandbox: Sandbox, reader: str, name: str, data: st.DataObject
) -> None:
    text = (sandbox.folder / name).read_bytes()
    strategy = changed_bytes(text) | changed_json(json.loads(text)).map(as_json)
    good = held(sandbox, "plan", name) if reader == "plan" else None
    check(sandbox, reader, data.draw(strategy), ".json", good)


@given(data=st.data())
def test_changed_recipes(sandbox: Sandbox, data: st.DataObject) -> None:
    texts = changed_recipe().map(lambda text: text.encode("utf-8", "surrogatepass"))
    given = data.draw(texts | changed_bytes(RECIPE.encode()))
    check(sandbox, "recipe", given, ".yaml")
