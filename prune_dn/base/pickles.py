"""Files of `torch.save`: written whole, and read without running code.

Of what is read only tensors, numbers, strings and containers are made. An object of any other class, such as
an `argparse.Namespace` or a number of numpy, becomes a `StandIn`, which takes all and does nothing.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from prune_dn.base.files import StrPath, file_size, write_bytes
from prune_dn.errors import CheckpointError

_MOST_CLASSES = 200  # other classes in one file
# Nothing of these is called either, but a file that asks for them is no honest checkpoint.
_HOSTILE = re.compile(
    r"(eval|exec|compile|open|__import__)$|(subprocess|shutil|importlib|runpy|ctypes|socket|pty|pickle)\b"
)
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")
_FILLED = re.compile(rf"Can only SETITEMS? for .* got <class '{re.escape(__name__)}\.(\S+)'>")
# What else begins like a zip of torch.save, by the end of an entry's name: what it is, and the remedy.
_OTHER_ARCHIVES = {
    "/constants.pkl": (
        "a TorchScript file: it holds code, which is not run here. Where you trust it",
        "torch.save(torch.jit.load(path).state_dict(), 'net.pt')",
    ),
    "/archive_format": (
        "a program of torch.export. Where you trust it",
        "torch.save(torch.export.load(path).state_dict, 'net.pt')",
    ),
}


class StandIn:
    """In the place of an object whose class is not for reading."""

    kind = "object"

    def __new__(cls, *arguments: object, **named: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class DictStandIn(StandIn):
    """In the place of a mapping that is no plain dict: one that is."""

    def __new__(cls, *arguments: object, **named: object) -> Any:
        return {}


def write_pickle(path: StrPath, value: Any) -> None:
    """`torch.save`, atomically. Raises WriteError where that cannot be."""
    whole = io.BytesIO()  # torch's own writer ends in C++ when the disk is full
    torch.save(value, whole)
    write_bytes(path, whole.getbuffer())


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, with stand-ins for all but tensors and plain values.

    Raises CheckpointError for a file that is damaged, or that unpacks to more than it is.
    """
    try:
        _check_archive(path)
        return _load(path)
    except CheckpointError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds for broken files
        raise CheckpointError(f"{path} is damaged or truncated: {_reason(error)}") from error


def _load(path: Path) -> Any:
    kinds: dict[str, type[StandIn]] = {}
    while True:
        allowed: Any = [
            (kind, full)  # torch leaves "builtins." out of its message
            for name, kind in kinds.items()
            for full in (name, f"builtins.{name}")
        ]
        try:
            with (
                path.open("rb") as file,  # of a path torch looks at the ending
                warnings.catch_warnings(),
                torch.serialization.safe_globals(allowed),
            ):
                warnings.simplefilter("ignore")  # about kinds of tensors that are refused later
                value = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = _REFUSED.search(str(error))
            known = found is None or found[1] in kinds or len(kinds) >= _MOST_CLASSES
            if found is not None and not known and not _HOSTILE.match(found[1]):
                kinds[found[1]] = type(found[1], (StandIn,), {"kind": found[1]})
                continue
            filled = _FILLED.search(str(error))
            if filled is not None and not issubclass(
                kinds.get(filled[1], DictStandIn), DictStandIn
            ):
                kinds[filled[1]] = type(filled[1], (DictStandIn,), {"kind": filled[1]})
                continue
            blocked = re.search(r"GLOBAL (\S+)", str(error))
            if blocked is None and not kinds:
                raise
            raise _more_than_tensors(path, [blocked[1]] if blocked else list(kinds)) from error
        if isinstance(value, StandIn):
            raise _more_than_tensors(path, [value.kind])
        return value


def _more_than_tensors(path: Path, needed: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} holds more than tensors, and reading it would run code (it needs "
        f"{', '.join(name[:100] for name in needed[:3])}). Where it was made, write torch.save(model.state_dict(), path) "
        "and load that"
    )


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return  # of before PyTorch 1.6
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        for end, (what, remedy) in _OTHER_ARCHIVES.items():
            if any(name.endswith(end) for name in names):
                raise CheckpointError(f"{path} is {what}: {remedy}, and load that")
        if sum(entry.file_size for entry in entries) > file_size(path):
            raise CheckpointError(
                f"{path} unpacks to more than it has: torch.save wrote no such file"
            )
        for entry in entries:
            if entry.CRC:  # 0: torch was told to leave it out
                _read_through(archive, entry)
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"{path} is a zip archive, but not of torch.save")


def _read_through(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Raise BadZipFile unless the checksum, which torch overlooks, is right."""
    with archive.open(entry) as part:
        while part.read(1 << 20):
            pass


def _reason(error: Exception) -> str:
    """The telling part of torch's long messages."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return text.split(". ")[0].split("\n")[0][:500] or type(error).__name__
