"""Folders of images: their files by class, and what a person should know of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prune_dn.data.images import Header, brightest, read_header
from prune_dn.errors import DataError

ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".gif"),
}
# Images that people have and that are not read.
FOREIGN = {
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".tga", ".svg", ".psd", ".raw", ".dng", ".exr"),
    *(".dcm", ".dicom", ".nii", ".mha", ".nrrd", ".npy", ".npz"),
}
VALIDATION = ("val", "valid", "validation")  # the names of the folder of validation images
LOOKED_AT = 10_000  # files of a split, evenly over it


@dataclass(frozen=True)
class Folder:
    """The files of an image folder's split, by class."""

    path: Path
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    left_out: tuple[Path, ...] = ()  # images in no class folder, or of formats that are not read

    @property
    def names(self) -> list[str]:
        """split/CLASS/.../file."""
        return [path.relative_to(self.path.parent).as_posix() for path in self.paths]


def list_folder(path: Path, classes: tuple[str, ...] | None = None) -> Folder:
    """The image files of `path`/CLASS/, with labels by sorted class name (or by `classes`).

    Hidden files and folders (`.ipynb_checkpoints`, `__MACOSX`) do not count, at any level. Raises
    DataError for a folder without classes, an empty class, or a class not in `classes`.
    """
    found = tuple(sorted(d.name for d in path.iterdir() if d.is_dir() and not is_hidden(d.name)))
    if not found:
        raise DataError(f"{path} has no class folders; put images under {path}/CLASS/")
    strange = [name for name in found if classes is not None and name not in classes]
    if strange and classes is not None:
        raise DataError(
            f"{path} has classes that the training images lack: {', '.join(strange)}; "
            f"the training classes are {', '.join(classes)}"
        )
    classes = classes or found
    paths: list[Path] = []
    labels: list[int] = []
    left_out = [f for f in path.iterdir() if f.is_file() and not is_hidden(f.name)]
    left_out = [f for f in left_out if f.suffix.lower() in ENDINGS | FOREIGN]
    for name in found:
        files = sorted(_files(path / name))
        images = [f for f in files if f.suffix.lower() in ENDINGS]
        left_out += [f for f in files if f.suffix.lower() in FOREIGN]
        if not images:
            raise DataError(f"{path / name} has no images ({', '.join(sorted(ENDINGS))})")
        paths += images
        labels += [classes.index(name)] * len(images)
    return Folder(path, classes, tuple(paths), tuple(labels), tuple(left_out))


def is_hidden(name: str) -> bool:
    """Whether systems and tools put it there, not the user."""
    return name.startswith(".") or name == "__MACOSX"


def _files(folder: Path) -> Iterator[Path]:
    """All files below, through links too, each folder once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not is_hidden(f)]
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        paths = (Path(root, f) for f in files if not is_hidden(f))
        # no pipes and sockets; a link to nothing is an error when it is read
        yield from (path for path in paths if path.is_file() or path.is_symlink())


@dataclass(frozen=True)
class Look:
    """The side that all files share by their headers, or None; 1 channel if all are grey."""

    side: int | None
    channels: int
    headers: tuple[Header, ...]


def look_at(folders: Sequence[Folder]) -> Look:
    """The headers of the files, of at most LOOKED_AT in each folder.

    Raises DataError for a file that is no image, and where 16-bit images use 12 bits.
    """
    paths = [p for x in folders for p in x.paths[:: -(-len(x.paths) // LOOKED_AT)]]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        headers = tuple(threads.map(read_header, paths))
    sizes = {header.size for header in headers}
    width, height = headers[0].size
    side = width if len(sizes) == 1 and width == height else None
    _check_depth([header.path for header in headers if header.deep])
    return Look(side, 1 if all(header.grey for header in headers) else 3, headers)


def _check_depth(paths: Sequence[Path]) -> None:
    """Refuse 12-bit values in 16-bit files: scaled as 16 bits, 16 levels of grey would be left."""
    some = paths[:: -(-len(paths) // 32)] if paths else paths
    most = max(map(brightest, some), default=65535)
    if most < 4096:
        raise DataError(
            f"the 16-bit images, such as {paths[0]}, hold no value above {most} of 65535 (in "
            f"{len(some)} files): scaled by their mode they would be nearly black; stretch the range "
            "that matters (12 bits: 0 to 4095) to 8 or 16 bits, the same way for all files"
        )


def notices(root: Path, folders: Mapping[str, Folder], look: Look, resize: str | None) -> list[str]:
    """Treatments of the images that their owner may not expect, one sentence each."""
    said = []

    def say(found: Sequence[Path], text: str, of: int = len(look.headers)) -> None:
        if found:
            first = found[0].relative_to(root)
            said.append(f"{len(found):,} of {of:,} images {text.format(f'(first: {first})')}")

    colour = [h.path for h in look.headers if not h.grey]
    if len(colour) < len(look.headers):
        say(colour, "are in colour {}, the others grey: all are read as colour, with 3 channels")
    if resize is None:
        say(
            [h.path for h in look.headers if h.size[0] != h.size[1]],
            "are not square {}: of each the centre is kept, and what lies beyond the square is cut "
            "off; choose resize: squash or pad to keep it, or crop to say that this is meant",
        )
    say(
        [h.path for h in look.headers if h.alpha],
        "have an alpha channel {}: they are laid on white",
    )
    say(
        [h.path for h in look.headers if h.frames],
        "have several frames or pages {}: only the first is read",
    )
    for folder in folders.values():
        files = folder.left_out
        text = "are left out {}: they lie in no class folder, or their format is not read"
        say(files, text, len(folder.paths) + len(files))
        missing = set(folder.classes) - {folder.classes[i] for i in folder.labels}
        if missing:
            said.append(f"{folder.path} has no images of {', '.join(sorted(missing))}")
    others = sorted(d.name for d in root.iterdir() if d.is_dir() and not is_hidden(d.name))
    if unread := [name for name in others if name not in {x.path.name for x in folders.values()}]:
        said.append(f"{root} also has {', '.join(unread)}, which is not read")
    return said


def copies(contents: Mapping[str, str]) -> list[str]:
    """Sentences about training images with the same content as others, of any split.

    `contents` are digests by name, split/CLASS/file; those of training images come first.
    """
    first: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name, digest in contents.items():
        split = name.split("/")[0]
        if digest in first:
            found.setdefault(split, []).append(name)
        elif split == "train":
            first[digest] = name
    return [
        f"{split} holds copies of {'other ' * (split == 'train')}training images: {len(names):,} "
        f"(first: {names[0]} is {first[contents[names[0]]]}); "
        + ("what is held out of them is no" if split == "train" else "scores on them are no")
        + " measure of a net that was trained on them"
        for split, names in found.items()
    ]
