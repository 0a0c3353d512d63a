"""Lists a folder of images: its splits, its classes, and what is left out of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from disttrain.errors import DataError, UsageError
from disttrain.shards.label_format import Label

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx", ".heic", ".heif",
)  # fmt: skip
VAL_NAMES = ("val", "valid", "validation", "dev", "test")
"""Names of the val split."""
_OF_SYSTEMS = frozenset(
    ("@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")
)
_SUB_FOLDER = "sub-folder of a class"
_LAYOUT = (
    "expected {0}/train/<class>/<image files> and {0}/val/<class>/... (or valid, validation, dev, test), "
    "or {0}/<class>/<image files> with --val-fraction"
)

Files = list[tuple[str, Label]]
"""Path and label of each image, sorted by label and name."""


def shown(path: str | os.PathLike[str]) -> str:
    """Returns a path for messages and records.

    Bytes that are not UTF-8 become escapes, and so do letters that would move the cursor or break the line.
    """
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def is_tree(source: Path) -> bool:
    """Returns whether a folder has a folder for each split."""
    return (source / "train").is_dir()


@dataclass
class Listing:
    """The images of a folder.

    Attributes:
        classes: names of the classes; those of the class folders of train are sorted.
        files: split -> its images.
        notes: which folder is which split, and what was left out: its kind and number; lines for the user.
    """

    classes: tuple[str, ...]
    files: dict[str, Files]
    notes: list[str]


def list_tree(folder: Path, val_fraction: float | None, follow_links: bool = False) -> Listing:
    """Lists the images of every split.

    Args:
        folder: DIR/{train,val}/<class>/<files>, or DIR/<class>/<files> with a fraction.
        val_fraction: given if the val split is taken from train.
        follow_links: take links to files and folders outside the folder.

    Raises:
        DataError: the folder does not have the expected layout.
        UsageError: there is a val split, and a fraction too.
    """
    splits, notes = _split_folders(folder, val_fraction)
    lister = _Lister(folder, follow_links)
    classes: tuple[str, ...] = ()
    files: dict[str, Files] = {}
    for split, split_folder in splits.items():
        if lister.leaves(split_folder):
            raise DataError(
                f"{split_folder}: this link leaves {folder}; take what it leads to with --follow-links, or "
                "put the images there"
            )
        folders = lister.entries(split_folder, _is_folder)
        if not folders:
            raise DataError(
                f"{split_folder}: has no class folders; {_LAYOUT.format(folder)}{_listed(lister.lines())}"
            )
        classes = classes or tuple(_class_name(entry) for entry in folders)  # of train, the first split
        files[split] = []
        for entry in folders:
            before = lister.lines()
            images = lister.entries(Path(entry.path), _is_image_file)
            if not images and split == "train":
                new = [line for line in lister.lines() if line not in before]
                raise DataError(f"{entry.path}: has no images; add some or remove the folder{_listed(new)}")
            if not images:
                lister.add("empty class folder of val", entry.path)
                continue
            if entry.name not in classes:
                raise DataError(
                    f"{shown(entry.path)}: train does not have this class; add it there or remove it here"
                )
            label = classes.index(entry.name)
            files[split] += [(image.path, label) for image in images]
        if not files[split]:
            raise DataError(f"{split_folder}: has no images; add some or remove the folder")
    return Listing(classes, files, notes + lister.lines())


def _listed(lines: list[str]) -> str:
    return f" ({'; '.join(lines)})" if lines else ""


def _split_folders(folder: Path, val_fraction: float | None) -> tuple[dict[str, Path], list[str]]:
    """Returns the folder of each split, and lines that say so."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {_LAYOUT.format('DIR')}")
    if not is_tree(folder):
        if val_fraction is None:
            raise DataError(f"{folder}: has no folder train; {_LAYOUT.format(folder)}")
        return {"train": folder}, []
    found = {"train": folder / "train"}
    name = next((name for name in VAL_NAMES if (folder / name).is_dir()), None)
    if name is None and val_fraction is None:
        names = f"{', '.join(VAL_NAMES[:-1])} or {VAL_NAMES[-1]}"
        raise DataError(f"{folder}: has no folder {names}; add one or use --val-fraction")
    if name is not None and val_fraction is not None:
        raise UsageError(f"{folder / name} is already the val split; leave out --val-fraction")
    note = f"{folder}: the train split is train"
    if name is not None:
        found["val"] = folder / name
        note += f", the val split is {name}"
    others = sorted(
        shown(path.name) for path in folder.iterdir() if path.is_dir() and path not in found.values()
    )
    return found, [note + (f"; left out: {', '.join(others)}" if others else "")]


def _class_name(entry: os.DirEntry[str]) -> str:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{shown(entry.path)}: the name of this class is not UTF-8; rename the folder"
        ) from None
    return entry.name


class LeftOut:
    """Counts what is left out of a folder of images, by its kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}  # number of such entries, and the first of them

    def add(self, kind: str, path: str) -> None:
        """Counts an entry of a kind."""
        number, first = self._kinds.get(kind, (0, path))
        self._kinds[kind] = number + 1, first

    def lines(self) -> list[str]:
        """Returns a line for each kind: how many, and the first of them."""
        return [
            f"left out: {number:,} x {kind}: {'such as ' * (number > 1)}{shown(first)}"
            for kind, (number, first) in self._kinds.items()
        ]


def file_kind(name: str) -> str:
    """Returns what kind of file this is by its name, such as `.txt file`."""
    suffix = Path(name).suffix.lower()
    return f"{shown(suffix)} file" if suffix else "file without a suffix"


class _Lister(LeftOut):
    """Lists the entries of folders that are to be packed, and counts the others.

    Args:
        folder: the folder of images.
        follow_links: take links to the outside.
    """

    def __init__(self, folder: Path, follow_links: bool) -> None:
        super().__init__()
        self.folder, self.follow_links = folder, follow_links

    def leaves(self, path: str | Path) -> bool:
        """Returns whether a link leads out of the folder and is not to be followed."""
        return not self.follow_links and not Path(path).resolve().is_relative_to(self.folder.resolve())

    def entries(self, folder: Path, wanted: Callable[[os.DirEntry[str]], bool]) -> list[os.DirEntry[str]]:
        """Returns the wanted entries of a folder, sorted by name, and notes the others."""
        found = []
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if kind := self._kind(entry, wanted):
                        self.add(kind, entry.path)
                        if kind == _SUB_FOLDER:
                            self._count_images(entry.path)
                    else:
                        found.append(entry)
        except OSError as error:
            raise DataError(
                f"{shown(folder)}: cannot be read: {error.strerror}; check its permissions"
            ) from None
        return found

    def _kind(self, entry: os.DirEntry[str], wanted: Callable[[os.DirEntry[str]], bool]) -> str:
        """Returns the kind of an entry that is left out; an empty string for one that is wanted."""
        if entry.name.startswith("."):
            return "hidden entry"
        if entry.name in _OF_SYSTEMS:
            return f"folder {entry.name} of the system"
        if entry.is_symlink():
            if not Path(entry.path).exists():
                return "broken link"
            if self.leaves(entry.path):
                what = "folder" if entry.is_dir() else "file"
                return f"link to a {what} outside (take it with --follow-links)"
        if wanted(entry):
            return ""
        if entry.is_dir():
            return _SUB_FOLDER
        if not entry.is_file():
            return "pipe, socket or device"
        if entry.name.lower().endswith(SUFFIXES):
            return "image beside the class folders"
        return file_kind(entry.name)

    def _count_images(self, folder: str) -> None:
        for place, _, names in os.walk(folder):
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES):
                    self.add("image in a sub-folder of a class (move it up)", f"{place}/{name}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir()


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and entry.is_file()
