"""A file has its final name only when it is whole."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from prune_dn.base.files import atomic_path, parse_json, read_text, write_bytes, write_text
from prune_dn.errors import WriteError


def test_new_file_in_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "net.onnx"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".onnx"
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert os.listdir(target.parent) == ["net.onnx"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "before ä")

    def broken() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        broken()
    assert target.read_text(encoding="utf-8") == "before ä"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "ours", "x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


def test_a_kill_leaves_no_half_file_under_the_name(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "before")
    code = (
        "import os, signal, sys\n"
        "from prune_dn.base.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "before"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_no_more(tmp_path: Path, code: int) -> None:
    """Every error of the system, wherever in the block, is one of ours; nothing is left behind."""
    write_text(tmp_path / "a.txt", "before")

    def full() -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(
        WriteError, match=rf"cannot write .*a.txt: {os.strerror(code)}; nothing was"
    ):
        full()
    assert (tmp_path / "a.txt").read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(WriteError, match=r"cannot write .*a.txt: Permission denied; nothing was"):
        write_bytes(tmp_path / "a.txt", b"x")


def test_devices_and_folders_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        before = target.stat().st_ino
        with pytest.raises(
            WriteError, match=r"it is (a folder|no regular file); nothing was changed"
        ):
            write_text(target, "x")
        assert target.stat().st_ino == before
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "x" * 250 + ".txt"])
def test_names_as_long_as_can_be(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "whole")
    assert read_text(tmp_path / name) == "whole"


def test_texts_are_read_with_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(tmp_path / "a") == "abc"
    with pytest.raises(ValueError, match="it has 6 bytes, and such a file has at most 5"):
        read_text(tmp_path / "a", 5)
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="can't decode"):
        read_text(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe")
    for path, text in (
        (tmp_path / "pipe", "no regular file, but a pipe or a device"),
        (Path("/dev/zero"), "no regular file"),
        (tmp_path, "it is a folder"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("x" * 256), "File name too long"),
        (tmp_path / "a\0b", "null byte in its name"),
    ):
        with pytest.raises(OSError, match=text):
            read_text(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "", "{", b"\xff\xfe1"]
)
def test_json_that_is_none(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    assert parse_json(json.dumps({"a": [1]})) == {"a": [1]}
