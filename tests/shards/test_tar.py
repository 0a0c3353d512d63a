"""The strict tar reader, against Python's own and against mutations.

What a damaged or hostile shard does to a run is tested in integration/test_data_faults.py.
"""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.errors import UnsafeError
from disttrain.shards.label_format import LabelReader
from disttrain.shards.tar import IMAGE_EXTENSIONS, Contents, scan

LONG = "very/long/" + "folder-" * 20 + "/"


def tar_of(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def look(folder: Path, content: bytes, classes: int | None = None) -> Contents:
    path = folder / "shard.tar"
    path.write_bytes(content)
    with path.open("rb") as file:
        return scan(file, LabelReader(classes=classes))


def members(count: int, prefix: str = "") -> dict[str, bytes]:
    chance = random.Random(count)
    found = {}
    for number in range(count):
        extension = IMAGE_EXTENSIONS[number % 4]
        found[f"{prefix}{number}.{extension}"] = chance.randbytes(chance.choice([1, 511, 512, 513, 2000]))
        found[f"{prefix}{number}.cls"] = str(number % 7).encode() + b"\n" * (number % 2)
        found[f"{prefix}{number}.extra.json"] = b"{}"
    return found


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "a/b/", LONG, "späße/"])
def test_samples_are_found_where_python_finds_them(tmp_path: Path, form: int, prefix: str) -> None:
    if form == tarfile.USTAR_FORMAT and prefix == LONG:
        prefix = "long/" + "folder-" * 12 + "/"  # what this format can hold
    content = tar_of(members(20, prefix), form)
    contents = look(tmp_path, content)
    assert contents.problems == {}
    assert contents.keys == tuple(f"{prefix}{number}" for number in range(20))
    assert contents.labels.tolist() == [number % 7 for number in range(20)]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        images = {member.name: member for member in tar if member.name.endswith(IMAGE_EXTENSIONS)}
    for place, key in enumerate(contents.keys):
        member = images[f"{key}.{contents.extensions[place]}"]
        assert (contents.offsets[place], contents.sizes[place]) == (member.offset_data, member.size)


def test_a_key_ends_at_the_first_dot_of_the_name(tmp_path: Path) -> None:
    contents = look(tmp_path, tar_of({"v1.2/a.JPG": b"x", "v1.2/a.cls": b"0", "v1.2/a.seg.png": b"y"}))
    assert contents.keys == ("v1.2/a",)
    assert contents.extensions == ("jpg",)


@pytest.mark.parametrize("classes", [None, 7, 6])
def test_labels_are_checked_if_the_classes_are_known(tmp_path: Path, classes: int | None) -> None:
    contents = look(tmp_path, tar_of(members(14)), classes)
    assert list(contents.problems) == ([6, 13] if classes == 6 else [])
    assert contents.labels[6] == (-1 if classes == 6 else 6)


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    contents = look(tmp_path, tar_of({".png": b"x", "a/._0.png": b"x", **members(2), ".cls": b"0"}))
    assert contents.keys == ("0", "1")


def test_members_that_nobody_asked_for_are_passed_over(tmp_path: Path) -> None:
    extra = {"README": b"x", "LICENSE.md": b"x", "meta/classes.json.zst": b"x"}
    contents = look(tmp_path, tar_of({**extra, **members(2), "1.json.gz": b"\x1f\x8b"}))
    assert (contents.keys, contents.problems) == (("0", "1"), {})
    with pytest.raises(ValueError, match="has no samples: no member is an image"):
        look(tmp_path, tar_of({"README": b"x"}))


@pytest.mark.parametrize("name", ["12:33:00_cam1", "cam:1/a:b", "2026-11-28T12:33"])
def test_a_colon_is_part_of_a_name(tmp_path: Path, name: str) -> None:
    assert look(tmp_path, tar_of({f"{name}.png": b"x", f"{name}.cls": b"0"})).keys == (name,)


@pytest.mark.parametrize("name", ["c:a.png", "D:/a.png", "http://host/a.png", "file:///a.png"])
def test_a_drive_and_a_url_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeError, match="leaves the folder"):
        look(tmp_path, tar_of({name: b"x"}))


def test_extended_attributes_are_passed_over(tmp_path: Path) -> None:
    values = {
        b"SCHILY.xattr.trusted.lov": bytes(range(256)),
        b"SCHILY.xattr.security.selinux": b"system_u:object_r:file_t:s0\0",
        b"SCHILY.xattr.user.large": b"\xff" * 2**16,
        b"path": LONG.encode() + b"0.png",
    }
    records = b"".join(pax_record(key, value) for key, value in values.items())
    header = tarfile.TarInfo("attributes")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    start = header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)
    contents = look(tmp_path, start + tar_of({"0.png": b"x", LONG + "0.cls": b"1"}))
    assert (contents.keys, contents.labels.tolist(), contents.problems) == ((LONG + "0",), [1], {})


def pax_record(key: bytes, value: bytes) -> bytes:
    """Returns one record of a pax header, which begins with its own length."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


@pytest.mark.parametrize("name", ["a\x1b[31m.png", "a\nb.png", "a\x7f.png"])
def test_names_that_would_disturb_a_terminal_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeError, match="has control characters") as caught:
        look(tmp_path, tar_of({name: b"x"}))
    assert str(caught.value).isprintable()


def test_folders_are_passed_over(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("a/0.png", "a/0.cls"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"1"))
    assert look(tmp_path, file.getvalue()).keys == ("a/0",)


def test_an_empty_tar_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no samples"):
        look(tmp_path, tar_of({}))
    with pytest.raises(ValueError, match="no end mark"):
        look(tmp_path, b"")


def test_every_cut_is_noticed_until_the_end_mark(tmp_path: Path) -> None:
    content = tar_of(members(5))
    last = max(i for i, byte in enumerate(content) if byte)
    whole = -(-(last + 1) // 512) * 512 + 1024
    for end in {*range(0, len(content), 512), *random.Random(0).sample(range(len(content)), 200)}:
        if end >= whole and end % 512 == 0:
            assert len(look(tmp_path, content[:end]).keys) == 5
        else:
            with pytest.raises(ValueError, match=r"truncated|not a tar|no end mark|half|whole number"):
                look(tmp_path, content[:end])


@pytest.mark.integration
def test_every_flipped_bit_of_a_header_is_noticed(tmp_path: Path) -> None:
    content = tar_of(members(2), tarfile.USTAR_FORMAT)
    sound = look(tmp_path, content)
    for bit in range(8 * 512):
        mutated = bytearray(content)
        mutated[bit // 8] ^= 1 << bit % 8
        try:
            found = look(tmp_path, bytes(mutated))
        except (ValueError, UnsafeError):
            continue
        assert (found.keys, found.problems) == (sound.keys, {}), bit  # the padding of a number, at most
        assert found.offsets.tolist() == sound.offsets.tolist()


@pytest.mark.integration
@settings(
    database=None,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=40)), max_size=6),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_whatever_the_bytes_samples_lie_in_the_file_or_it_is_refused(
    tmp_path: Path, edits: list[tuple[int, bytes]], form: int
) -> None:
    content = bytearray(tar_of(members(3, LONG if form != tarfile.USTAR_FORMAT else ""), form))
    for place, patch in edits:
        begin = place % len(content)
        content[begin : begin + len(patch)] = patch[: len(content) - begin]
    for header in range(0, len(content) - 511, 512):  # sound checksums, so that more than these is tried
        if content[header + 257 : header + 262] == b"ustar":
            total = sum(content[header : header + 512]) - sum(content[header + 148 : header + 156]) + 256
            content[header + 148 : header + 156] = f"{total:06o}\0 ".encode()
    try:
        contents = look(tmp_path, bytes(content))
    except (ValueError, UnsafeError):
        return
    ends = contents.offsets + contents.sizes
    assert len(contents.keys) == len(contents.extensions) == len(contents.labels) == len(ends)
    assert (contents.sizes >= 0).all()
    assert (contents.offsets >= 0).all()
    assert (ends <= len(content)).all()
