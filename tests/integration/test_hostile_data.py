"""Data made to do harm: refused with little time and memory, and nothing executed or touched."""

import gzip
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from disttrain.data.decoded_copy import open_split
from disttrain.data.streamed import Streamed
from disttrain.errors import DataError, UnsafeError
from disttrain.shards.verify import verify
from kit.commands import Run
from kit.faults import (
    CPU,
    HUGE,
    NOTHING,
    Member,
    Way,
    both_ways,
    edit,
    good,
    image,
    index_it,
    load,
    look,
    make,
    patched,
    png,
    put,
    refused,
    sample,
    serve,
    shard_entry,
    tar_of,
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path_factory.mktemp("own-cache")))


# --- Hostile: little time, little memory, nothing executed, nothing touched -----------------------


def surroundings(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns path -> size and time of all that lies around a data set."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


class Bite:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (os.system, (f"touch {self.target}",))


COMMANDS = [
    "pipe:touch pwned",
    "pipe:touch pwned; cat train-1.tar",
    "../outside.tar",
    "sub/../../outside.tar",
    "./train-1.tar",
    "/etc/passwd",
    "file:///etc/passwd",
    "file:train-1.tar",
    "ftp://localhost/train-1.tar",
    "s3://key:secret@bucket/train-1.tar",
    "train-1.tar | touch pwned",
    "train-1.tar; touch pwned",
    "$(touch pwned).tar",
    "`touch pwned`.tar",
    "-rf.tar",
    "train-1.tar\n",
    "train-1.tar\0",
    "~/train-1.tar",
    "",
]

NO_ADDRESSES = [
    "http://x;touch pwned",
    "http://x/$(touch pwned).tar",
    "https:///etc/passwd",
    "http://x/\n|touch pwned",
    "http://[x/a.tar",
]


def name_shard(folder: Path, file: str) -> None:
    edit(folder, lambda content: shard_entry(content, "train-1.tar").update(file=file))


@both_ways
@pytest.mark.parametrize("file", [*COMMANDS, *NO_ADDRESSES])
def test_an_index_that_names_a_command_or_leaves_its_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, way: Way
) -> None:
    folder = make(tmp_path / "inside")
    (tmp_path / "outside.tar").write_bytes((folder / "train-1.tar").read_bytes())
    (tmp_path / "inside" / "outside.tar").write_bytes((folder / "train-1.tar").read_bytes())
    name_shard(folder, file)
    if file in NO_ADDRESSES:
        (folder / "train-1.tar").unlink()  # or it would be refused as one too many
    monkeypatch.chdir(folder)
    before = surroundings(tmp_path)
    error = refused(lambda: serve(load(folder), way))
    if file in COMMANDS:
        assert isinstance(error, UnsafeError)
        assert f"{folder}/index.json: refused to open {file!r}" in str(error)
    assert surroundings(tmp_path) == before


def test_a_run_on_an_index_that_names_a_command_ends_with_77(tmp_path: Path, train: Run) -> None:
    name_shard(make(tmp_path), "pipe:touch pwned")
    for options in ((), ("data.on_error=skip",)):
        result = train("run", "--procs", "1", *options)
        assert result.returncode == 77, result.stderr
        assert "set/index.json: refused to open 'pipe:touch pwned'" in result.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_a_root_that_is_a_command_ends_with_77(disttrain: Run, tmp_path: Path) -> None:
    for root in ("pipe:touch pwned", "pipe:cat x | touch pwned", "file:///etc"):
        for command in (("data", "verify"), ("data", "inspect")):
            result = disttrain(*command, "set", "--root", root)
            assert result.returncode == 77, result.stderr
            assert "refused to open" in result.stderr
    assert not list(tmp_path.rglob("pwned"))


def special(name: str, kind: bytes, link: str = "", **pax: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.devmajor, member.devminor = 1, 3
    member.pax_headers = {key.replace("__", "."): value for key, value in pax.items()}
    return member


def claiming(size: int) -> bytes:
    member = tarfile.TarInfo("bad.png")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def open_ended(members: list[Member]) -> bytes:
    """Returns a tar without its end mark."""
    return tar_of(*members)[: sum(512 + -(-len(content) // 512) * 512 for _, content in members)]


def hostile_tar(kind: str, outside: Path) -> bytes:
    """Returns a shard of two good samples and something that does not belong there."""
    start = good("y", 2)
    payload = pickle.dumps(Bite(outside / "pwned"))
    pax = tarfile.PAX_FORMAT
    names = {
        "absolute name": str(outside / "pwned.png"),
        "name with ..": "../pwned.png",
        "name with .. inside": "a/../../pwned.png",
        "name with a drive": "c:/pwned.png",
        "name with a backslash": "..\\pwned.png",
        "gzip member": "bad.cls.gz",
        "xz member": "bad.png.XZ",
        "zip member": "bad.zip",
    }
    if kind in names:
        return tar_of(*start, (names[kind], image(0)), ("bad.cls", b"1"))
    pickles = {"pickle": "bad.pkl", "pickle of a label": "bad.cls.pyd", "weights": "bad.PTH"}
    if kind in pickles:
        return tar_of(*start, (pickles[kind], payload), ("bad.png", image(0)), ("bad.cls", b"1"))
    members = {
        "symbolic link": special("bad.png", tarfile.SYMTYPE, "/etc/passwd"),
        "symbolic link to a folder": special("bad", tarfile.SYMTYPE, str(outside)),
        "hard link": special("bad.png", tarfile.LNKTYPE, "y0.png"),
        "character device": special("bad.png", tarfile.CHRTYPE),
        "block device": special("bad.png", tarfile.BLKTYPE),
        "named pipe": special("bad.png", tarfile.FIFOTYPE),
        "GNU sparse": special("bad.png", tarfile.GNUTYPE_SPARSE),
        "contiguous": special("bad.png", tarfile.CONTTYPE),
        "unknown kind": special("bad.png", b"Z"),
    }
    if kind in members:
        return tar_of(*start, members[kind])
    if kind == "pax sparse":
        return tar_of(*start, special("bad.png", tarfile.REGTYPE, GNU__sparse__major="1"), form=pax)
    if kind == "pax name with ..":
        return tar_of(*start, ("../" * 60 + "pwned.png", image(0)), form=pax)
    if kind == "GNU name with ..":
        return tar_of(*start, ("../" * 60 + "pwned.png", image(0)), form=tarfile.GNU_FORMAT)
    if kind == "pax header of 1 GiB":
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, 2**30
        return open_ended(start) + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    if kind == "gzip of the tar":
        return gzip.compress(tar_of(*start, ("bad.png", bytes(2**24))), mtime=0)
    sizes = {"claims 512 MiB": 2**29, "claims 8 EiB": 2**63, "claims to be negative": -1}
    return open_ended(start) + claiming(sizes[kind])


UNSAFE = [
    "absolute name", "name with ..", "name with .. inside", "name with a drive", "name with a backslash",
    "gzip member", "xz member", "zip member", "pickle", "pickle of a label", "weights",
    "symbolic link", "symbolic link to a folder", "hard link", "character device", "block device",
    "named pipe", "GNU sparse", "contiguous", "unknown kind", "pax sparse", "pax name with ..",
    "GNU name with ..",
]  # fmt: skip

DAMAGED = [
    "pax header of 1 GiB",
    "gzip of the tar",
    "claims 512 MiB",
    "claims 8 EiB",
    "claims to be negative",
]


@pytest.mark.parametrize("kind", [*UNSAFE, *DAMAGED])
def test_a_hostile_shard_is_refused_at_once_and_touches_nothing(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path / "inside")
    put(folder, "train-1.tar", hostile_tar(kind, tmp_path))
    index = load(folder)
    before = surroundings(tmp_path)
    expected = UnsafeError if kind in UNSAFE else DataError
    calls: dict[str, Callable[[], object]] = {
        "host": lambda: serve(index, "host"),
        "none": lambda: serve(index, "none"),
        "data index": lambda: index_it(folder, force=True),
    }
    if kind in UNSAFE:
        calls |= {"skip": lambda: look(index), "verify": lambda: verify(index)}
    else:
        assert look(index) == [3, 4, 5, 6]
        assert [problem.place for problem in verify(index)] == [f"{folder}/train-1.tar"]
    for name, call in calls.items():
        error = refused(call)
        assert type(error) is expected or (expected is DataError and isinstance(error, DataError)), name
        assert f"{folder}/train-1.tar: " in str(error)
    assert surroundings(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("data.on_error=skip", "data.cache=none")])
def test_a_run_on_a_pickle_ends_with_77_and_does_not_open_it(
    tmp_path: Path, train: Run, options: tuple[str, ...]
) -> None:
    folder = make(tmp_path)
    put(folder, "train-1.tar", hostile_tar("pickle", tmp_path))
    result = train("run", "--procs", "1", *options)
    assert result.returncode == 77, result.stderr
    assert "set/train-1.tar: member 'bad.pkl' is a pickle" in result.stderr
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("kind", "code"), [("name with ..", 77), ("symbolic link", 77), ("gzip of the tar", 65)]
)
def test_the_commands_end_with_the_code_of_what_they_refuse(
    disttrain: Run, tmp_path: Path, kind: str, code: int
) -> None:
    folder = make(tmp_path)
    put(folder, "train-1.tar", hostile_tar(kind, tmp_path))
    for command in (("verify", "set", "--root", tmp_path), ("index", folder, "--force")):
        result = disttrain("data", *command)
        assert result.returncode == code, result.stderr
        assert "set/train-1.tar: " in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


def test_a_member_of_512_mib_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    size = 512 + 2**29 + 1024
    with (folder / "train-1.tar").open("wb") as file:  # a file with a hole: takes no room on the disk
        file.write(claiming(2**29)[:512])
        file.truncate(size)
    edit(folder, lambda content: shard_entry(content, "train-1.tar").update(bytes=size))
    before = surroundings(tmp_path)
    error = refused(lambda: serve(load(folder), "none"))
    assert "member bad.png has 536870912 bytes" in str(error)
    assert surroundings(tmp_path) == before


def test_a_member_of_200_mib_takes_no_memory(tmp_path: Path) -> None:
    folder = make(tmp_path)
    content = b"".join(
        [claiming(200 * 2**20)[:512], b"\x89PNG", bytes(200 * 2**20 - 4), tar_of(("bad.cls", b"1"))]
    )
    put(folder, "train-1.tar", content)
    edit(folder, lambda index: shard_entry(index, "train-1.tar").update(samples=1))
    edit(folder, lambda index: index["splits"]["train"].update(samples=4, class_counts=[0, 0, 0, 0]))
    del content
    index = load(folder)
    look(index)  # its hash takes longer than a second
    assert "sample bad" in str(refused(lambda: serve(index, "none")))


# --- Bombs ----------------------------------------------------------------------------------------


def zeros(mib: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    return b"".join([*(packer.compress(block) for _ in range(mib)), packer.flush()])


def black_webp(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "WEBP", lossless=True, quality=0, method=0)
    return file.getvalue()


BOMBS: dict[str, Callable[[], list[Member]]] = {
    "PNG": lambda: sample(png=png(9000, 9000, rows=zeros(232))),
    "PNG of usual size": lambda: sample(png=png(6000, 6000, rows=zeros(103))),
    "PNG with a palette": lambda: sample(png=png(8000, 8000, (b"PLTE", bytes(768)), color=3, rows=zeros(62))),
    "PNG with alpha": lambda: sample(png=png(5000, 5000, color=6, rows=zeros(96))),
    "PNG text": lambda: sample(png=png(9, 8, (b"zTXt", b"Comment\0\0" + zeros(512)))),
    "PNG color profile": lambda: sample(png=png(9, 8, (b"iCCP", b"p\0\0" + zeros(512)))),
    "PNG with more than its pixels": lambda: sample(png=png(9, 8, (b"gAMA", bytes(4)), rows=zeros(512))),
    "JPEG": lambda: sample(jpg=HUGE["jpg"]),
    "WebP": lambda: sample(webp=HUGE["webp"]),
    "WebP of usual size": lambda: sample(webp=black_webp(5000)),
    "GIF": lambda: sample(png=patched(image(0, "GIF"), 6, "<HH", 65535, 65535)),
    "BMP": lambda: sample(png=patched(image(0, "BMP"), 18, "<ii", 30_000, 30_000)),
    "PPM": lambda: sample(png=b"P6 30000 30000 255\n" + bytes(100)),
}


# In a data set of images of any size, these are images: large ones, or one with too many rows.
ALLOWED = ("PNG of usual size", "PNG with a palette", "PNG with alpha", "WebP of usual size")
ALLOWED += ("PNG with more than its pixels",)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_of_an_image_is_refused_by_shard_and_key(tmp_path: Path, kind: str) -> None:
    members = BOMBS[kind]()
    assert len(members[0][1]) < 2**20
    folder = make(tmp_path)
    put(folder, "train-1.tar", tar_of(*good("y", 2), *members, *good("z", 1)))
    index = load(folder)
    calls = [lambda: serve(index, "none"), lambda: serve(index, "host")]
    if kind not in ALLOWED:
        calls.append(lambda: index_it(folder, skip=False, force=True))
    for call in calls:
        error = refused(call)
        assert f"{folder}/train-1.tar: sample bad: " in str(error)


def test_a_bomb_that_is_the_first_image_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    put(folder, "train-0.tar", tar_of(*BOMBS["PNG"](), *good("w", 2)))
    error = refused(lambda: index_it(folder, skip=False, force=True))
    assert f"{folder}/train-0.tar: sample bad: " in str(error)


def test_a_label_of_ten_digits_takes_no_memory(tmp_path: Path) -> None:
    folder = make(tmp_path)
    put(folder, "train-1.tar", tar_of(*good("y", 2), *sample(label=b"9999999999", png=image(0))))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
        "from disttrain.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "data", "index", str(folder), "--force"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 65, result.stderr[-300:]
    assert "train-1.tar: sample bad: " in result.stderr


# --- Hostile index and files ----------------------------------------------------------------------


def grow(content: dict[str, Any], samples: int) -> None:
    train = content["splits"]["train"]
    train["shards"][0]["samples"] += samples
    train["samples"] += samples


CLAIMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "images of a terapixel": lambda content: content.update(height=10**6, width=10**6),
    "more samples than bytes": lambda content: grow(content, 10**13),
    "more samples than a number holds": lambda content: grow(content, 2**64),
}


@both_ways
@pytest.mark.parametrize("claim", CLAIMS)
def test_an_index_that_claims_the_impossible_is_refused(tmp_path: Path, claim: str, way: Way) -> None:
    folder = make(tmp_path)
    edit(folder, CLAIMS[claim])
    index_or_shard = rf"{re.escape(str(folder))}/(index\.json|train-0\.tar): "

    def serve_ten() -> None:
        index = load(folder)
        if way == "host":
            open_split(index, "train", NOTHING, lambda text: None)
        else:
            loader = Streamed(index, "train", CPU, batch_size=4, workers=0, say=lambda text: None)
            list(loader.batches(np.arange(7), [slice(0, 4)]))

    assert re.match(index_or_shard, str(refused(serve_ten)))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0" * 1000,
        b"[" * 200_000,
        b'{"version": 1e999}',
        b"\xff\xfe",
        b'{"version": 1, "classes": null}',
    ],
)
def test_what_is_no_index_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = make(tmp_path)
    (folder / "index.json").write_bytes(text)
    assert f"{folder}/index.json: " in str(refused(lambda: load(folder)))


def test_an_index_of_200_mib_takes_no_memory(tmp_path: Path) -> None:
    folder = make(tmp_path)
    os.truncate(folder / "index.json", 200 * 2**20)
    assert f"{folder}/index.json: " in str(refused(lambda: load(folder)))


def test_a_named_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    cases = {"index": "train-1.tar", "verify": "train-1.tar", "inspect": "index.json"}
    processes = {}
    for command, file in cases.items():
        folder = make(tmp_path / command)
        (folder / file).unlink()
        os.mkfifo(folder / file)
        arguments = {"index": [str(folder), "--force"]}.get(command, ["set", "--root", str(folder.parent)])
        processes[command] = subprocess.Popen(
            [sys.executable, "-m", "disttrain", "data", command, *arguments], stderr=subprocess.DEVNULL
        )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(process.poll() is None for process in processes.values()):
        time.sleep(0.05)
    codes = {command: process.poll() for command, process in processes.items()}
    for process in processes.values():
        process.kill()
        process.wait()
    assert {code in {65, 77} for code in codes.values()} == {True}, codes
