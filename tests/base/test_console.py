"""What is printed: names that act on no terminal, streams that are closed or full."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Run, bad, run  # noqa: F401  (a fixture)
from hypothesis import given
from hypothesis import strategies as st

from prune_dn.base.console import as_lines, plain, say, show
from prune_dn.base.yaml_lines import dump, parse
from prune_dn.checkpoints.checkpoint import save, save_state_dict
from prune_dn.cli import app as cli
from prune_dn.errors import WriteError
from prune_dn.models import densenet
from prune_dn.run import inspection
from prune_dn.run.recipe_file import parse_recipe

NASTY = "a\nerror: b\r\x1b[31mred\u202eback\x07\udcff"


@given(st.text())
def test_plain_text_is_one_printable_line(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable() and len(shown.splitlines()) <= 1
    assert (shown == text) == text.isprintable()
    shown.encode()  # no half of a surrogate pair


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_dumped_recipe_is_printable_and_reads_back(text: str) -> None:
    written = dump({"model": {"checkpoint": text}})
    assert all(line.isprintable() for line in written.split("\n"))
    assert parse(written).value == {"model": {"checkpoint": text}}


def test_what_a_person_sees(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {NASTY: NASTY, "list": [NASTY], "deep": {NASTY: {NASTY: 1}}}
    show(facts, False, table=(["[bold]net"], [[NASTY], ["[red]x[/]"]]), lines=facts)
    shown = capsys.readouterr().out
    assert "[bold]net" in shown and "[red]x[/]" in shown  # names, not markup
    assert all(line.isprintable() for line in shown.split("\n"))
    assert shown.count(plain(NASTY)) == 6
    assert not [line for line in shown.split("\n") if line.startswith("error")]
    assert list(as_lines({"a": 1.5})) == ["a: 1.5"]
    show(facts, True)
    assert json.loads(capsys.readouterr().out) == facts


def test_names_in_errors_are_one_line(run: Run, tmp_path: Path) -> None:  # noqa: F811
    name = "a\nerror: b\x1b[31m\u202e"
    for command in (["validate", name], ["show", name], ["evaluate", name, "--data", "digits"]):
        code, out, err = run(*command)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
        assert plain(name) in err
    (tmp_path / name).write_text("seed: 1\n\"x\\ny\\u202E\": 1\ndata: {name: 'a\u202eb'}\n")
    code, _, err = run("validate", name, "--set", f"{name}=1")
    assert code == 2 and all(line.isprintable() for line in err.split("\n"))
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and plain(name) in lines[0]
    assert all(line.startswith((plain(name), "--set")) for line in lines[1:])
    bad(run("show", "x\ny"), r"x\\ny")


def test_class_names_and_info_of_a_checkpoint(run: Run, tmp_path: Path) -> None:  # noqa: F811
    net = densenet((2,), 4, stem="cifar", num_classes=2, in_channels=1)
    info = {"data": {"classes": [NASTY[:-1], "b"]}, NASTY[:-1]: 1}
    save(net, tmp_path / "net.safetensors", info=info)
    code, out, err = run("show", "net.safetensors")
    assert code == 0, err
    assert all(line.isprintable() for line in out.split("\n"))
    assert out.count(plain(NASTY[:-1])) == 2
    save_state_dict(net, tmp_path / "a\nb.pt")
    code, out, err = run("show", "a\nb.pt")
    assert code == 0 and err.startswith("a\\nb.pt: took ") and len(err.splitlines()) == 1


def test_a_stdout_that_is_full_or_closed(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    for stream, reason in ((Full(), "No space left on device"), (None, "it is closed")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            code = cli.main(["criteria"])
        assert code == 2
        assert capsys.readouterr().err == f"error: cannot write to stdout: {reason}\n"
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(WriteError, match="to stdout: No space"):
        say("x")


def test_streams_that_the_shell_closed() -> None:
    """In a process of its own: files must not get the numbers of closed streams."""
    code = (
        "import os, sys\n"
        "from prune_dn.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "file = open(os.devnull)\n"
        "assert file.fileno() > 2, file.fileno()\n"
        "sys.exit(code)\n"
    )
    for closed, arguments, code_expected, shown in (
        (">&-", "--help", 1, "error: [Errno 9] it is closed\n"),
        ("2>&-", "validate none.yaml", 2, ""),
        ("<&- >&- 2>&-", "validate none.yaml", 2, ""),
    ):
        command = f'"$0" -c "$1" {arguments} {closed}'
        done = subprocess.run(
            ["sh", "-c", command, sys.executable, code], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (code_expected, "", shown)


def test_a_reader_that_left_ends_it_without_a_word() -> None:
    code = "import sys\nfrom prune_dn.cli import main\nsys.exit(main(['--help']))\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_too_little_memory(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(inspection, "show_file", broken)
    code, out, err = run("show", "net")
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert err.startswith("error: out of memory: use smaller batches") and "mistake" not in err


def test_real_memory_that_is_not_there(run: Run) -> None:  # noqa: F811
    """torch's own error, on any machine: 2**60 bytes."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert cli._is_memory(caught.value)
    assert not cli._is_memory(RuntimeError("shapes do not match"))


def test_a_recipe_with_strange_values_is_shown_escaped(run: Run, tmp_path: Path) -> None:  # noqa: F811
    text = (
        'model: {checkpoint: "a\\u202Eb\\x1b[31m"}\ndata: {name: digits}\n'
        "prune: {pruning_ratio: 0.5}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    code, out, _ = run("validate", "r.yaml")
    assert code == 0 and all(line.isprintable() for line in out.split("\n"))
    assert parse_recipe(out, name="r") == parse_recipe(text, name="r")
