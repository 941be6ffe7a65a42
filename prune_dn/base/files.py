"""Files appear whole or not at all, and are read with a limit."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prune_dn.errors import WriteError

StrPath = str | os.PathLike[str]
_LONGEST_NAME = 255  # bytes
MOST_TEXT = 1 << 26  # bytes of a text file


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it gets the final name only if the block succeeds.

    The folder of `path` is made if need be. On an error (or a kill) `path` is what it was before.

    Raises WriteError for a path that cannot be written, and for every OSError in the block: a full
    disk, say.

    >>> import pathlib, tempfile
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    with atomic_paths(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_paths(*paths: StrPath) -> Iterator[tuple[Path, ...]]:
    """Yield temporary paths beside files that belong together: all get their names, or none.

    As `atomic_path`; of several, new and old files never stand side by side: the old ones are put aside first,
    and put back where that fails. A kill in that moment leaves them aside, under names in `.tmp`.
    """
    finals = [Path(path) for path in paths]
    temporaries: list[Path] = []
    try:
        for final in finals:
            temporaries.append(_beside(final))  # noqa: PERF401 - those made so far are removed
        yield tuple(temporaries)
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
        _place(temporaries, finals)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        names = " and ".join(str(final) for final in finals)
        raise WriteError(f"cannot write {names}: {reason}; nothing was changed") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _place(temporaries: list[Path], finals: list[Path]) -> None:
    """Give all files their names; where one cannot have it, all is as before."""
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for final in finals if len(finals) > 1 else ():
            if final.exists():
                aside.append((_beside(final), final))
                os.replace(final, aside[-1][0])
        for temporary, final in zip(temporaries, finals, strict=True):
            os.replace(temporary, final)
            placed.append(final)
    except OSError:
        for final in placed:
            final.unlink()
        for old, final in aside:
            if final.exists():  # it was not moved: the empty file made for it goes
                old.unlink()
            else:
                os.replace(old, final)
        raise
    for old, _ in aside:
        old.unlink()


def write_text(path: StrPath, text: str) -> None:
    """Write a whole text file atomically (UTF-8)."""
    write_bytes(path, text.encode())


def write_bytes(path: StrPath, data: bytes | memoryview) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def same_file(one: StrPath, other: StrPath) -> bool:
    """Whether two paths are of one file: also by a link of any kind, and where none is there yet."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


def file_size(path: StrPath) -> int:
    """Bytes of a regular file. Raises OSError for everything else, before it is opened."""
    try:
        found = os.stat(path)
    except ValueError as error:  # a NUL
        raise OSError(f"{error} in its name") from None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError("it is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file, but a pipe or a device")
    return found.st_size


def wrong_name(path: StrPath) -> str | None:
    """Why there can be no such path on any disk; None = there can."""
    name = os.fspath(path)
    if "\0" in name:
        return "has a NUL in it, which no path can have"
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(name).parts):
        return f"has a name of more than {_LONGEST_NAME} bytes in it, which no disk keeps"
    return None


def read_text(path: StrPath, most: int = MOST_TEXT) -> str:
    """Read a text file (UTF-8). Raises OSError or ValueError for what is none, or has over `most` bytes."""
    size = file_size(path)
    if size > most:
        raise ValueError(f"it has {size:,} bytes, and such a file has at most {most:,}")
    return Path(path).read_text(encoding="utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """Read a JSON text. Raises ValueError for all that is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _beside(final: Path) -> Path:
    """A new file in the folder of `final`."""
    if "\0" in str(final):
        raise OSError("there is a NUL in its name")
    if final.exists() and not final.is_file():
        raise OSError("it is a folder" if final.is_dir() else "it is no regular file")
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{final.name[:32]}.", suffix=f".tmp{final.suffix}", dir=final.parent
    )
    os.close(handle)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
