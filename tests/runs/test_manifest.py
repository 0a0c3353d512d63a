"""The files of a checkpoint: which one is sound, and what becomes of the others."""

import os
import subprocess
import sys

import pytest

from disttrain.errors import CheckpointError
from disttrain.runs.manifest import (
    STATE,
    canonical,
    entry,
    latest_valid,
    list_steps,
    quarantine,
    read,
    read_state,
    size,
    step_of,
    verify_checkpoint,
    write_manifest,
)


def make(folder, step, name=None, text=""):
    """Makes a checkpoint as files alone."""
    path = folder / (name or f"step_{step:08d}")
    path.mkdir(parents=True)
    contents = {
        "model.safetensors": f"the weights of step {step} {text}".encode(),
        STATE: canonical({"state": {"step": step}, "parts": {}}),
    }
    for part, data in contents.items():
        (path / part).write_bytes(data)
    write_manifest(path, {part: entry(part, data) for part, data in contents.items()})
    return path


def damage(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    """A checkpoints folder with the steps 9, 10 and 100000000; the links lead to the newest."""
    for step in (9, 10, 10**8):
        make(tmp_path, step)
    for link in ("latest", "best"):
        (tmp_path / link).symlink_to(f"step_{10**8}")
    return tmp_path


def test_what_is_read(folder):
    path = folder / "step_00000009"
    assert list(read(path)) == ["model.safetensors", STATE]
    assert read(path)["model.safetensors"] == b"the weights of step 9 "
    assert read_state(path) == {"step": 9}
    assert size(path) == sum((path / name).stat().st_size for name in ("model.safetensors", STATE))


def test_the_newest_is_that_of_the_highest_step_whatever_the_links_say(folder):
    for link in ("latest", "best"):
        (folder / link).unlink()
    assert latest_valid(folder) == (folder / f"step_{10**8}", [])
    (folder / "latest").symlink_to("step_00000009")
    assert latest_valid(folder) == (folder / f"step_{10**8}", [])


def test_what_is_no_checkpoint_is_not_looked_at(folder):
    for name in (".step_00000200.partial", "damaged_step_00000200", "step_x", "step_7", "step_00000300.old"):
        make(folder, 200, name)
    (folder / "step_00000400").touch()
    assert [step_of(path) for path in list_steps(folder)] == [10**8, 10, 9]


def test_a_damaged_one_is_passed_over_and_said(folder):
    damage(folder / f"step_{10**8}")
    (folder / "step_00000010" / "MANIFEST.json").unlink()
    found, damages = latest_valid(folder)
    assert found == folder / "step_00000009"
    first, second = map(str, damages)
    assert first.startswith(f"{folder}/step_{10**8}/model.safetensors: damaged: found 30 bytes with sha256 ")
    good = read(found)["model.safetensors"].replace(b"9", str(10**8).encode())
    assert f"the manifest says 30 bytes with {entry('model.safetensors', good)['sha256']};" in first
    assert second.startswith(f"{folder}/step_00000010/MANIFEST.json: missing: No such file")


def test_none_is_sound(folder):
    for path in list_steps(folder):
        damage(path)
    with pytest.raises(CheckpointError) as caught:
        latest_valid(folder)
    lines = str(caught.value).splitlines()
    assert [line.partition(": damaged")[0] for line in lines[:3]] == [
        f"{folder}/step_{step:08d}/model.safetensors" for step in (10**8, 10, 9)
    ]
    assert lines[3:] == [f"{folder}: no checkpoint is sound; begin a new run in another --run-dir"]


def test_a_link_to_nothing_is_no_beginning(tmp_path):
    (tmp_path / "latest").symlink_to("step_00000005")
    with pytest.raises(CheckpointError, match="latest: leads to step_00000005, which is missing"):
        latest_valid(tmp_path)


@pytest.mark.parametrize("name", ["missing", "file", "empty"])
def test_there_never_was_one(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert latest_valid(tmp_path / name) == (None, [])


def test_one_that_was_being_replaced_counts_until_the_new_one_is_there(folder):
    old = make(folder, 10, ".step_00000010.replaced", "before")
    assert list_steps(folder)[1:3] == [folder / "step_00000010", old]
    damage(folder / f"step_{10**8}")
    assert latest_valid(folder)[0] == folder / "step_00000010"
    (folder / "step_00000010").rename(folder / ".step_00000010.partial")
    found, damages = latest_valid(folder)
    assert (found, len(damages)) == (old, 1)
    chosen, _ = quarantine(found, 10)
    assert chosen == folder / "step_00000010"
    assert read(chosen)["model.safetensors"] == b"the weights of step 10 before"


def test_what_is_newer_than_the_chosen_one_is_set_aside(folder):
    damage(folder / f"step_{10**8}")
    chosen, lines = quarantine(folder / "step_00000009", 9)
    assert chosen == folder / "step_00000009"
    assert names(folder) == [
        "abandoned_step_00000010",
        f"damaged_step_{10**8}",
        "latest",
        "step_00000009",
    ]
    assert (folder / "latest").resolve() == chosen
    assert lines == [
        f"{folder}/step_{10**8} is kept as damaged_step_{10**8}",
        f"{folder}/step_00000010 is kept as abandoned_step_00000010",
    ]
    make(folder, 10)
    assert quarantine(chosen, 9)[1] == [f"{folder}/step_00000010 is kept as abandoned_step_00000010-2"]
    assert latest_valid(folder) == (chosen, [])


def test_one_that_was_set_aside_can_be_gone_on_from(folder):
    chosen, _ = quarantine(folder / "step_00000009", 9)
    make(folder, 10, text="of the second attempt")
    chosen, lines = quarantine(folder / "abandoned_step_00000010", 10)
    assert chosen == folder / "step_00000010"
    assert read(chosen)["model.safetensors"] == b"the weights of step 10 "
    assert lines == [f"{folder}/step_00000010 is kept as abandoned_step_00000010-2"]
    assert latest_valid(folder) == (chosen, [])


def test_nothing_newer_nothing_set_aside(folder):
    before = {path: os.lstat(path).st_mtime_ns for path in folder.rglob("*")}
    assert quarantine(folder / f"step_{10**8}", 10**8) == (folder / f"step_{10**8}", [])
    assert {path: os.lstat(path).st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 2}', "[" * 100_000])
def test_what_is_no_manifest(folder, text):
    path = folder / "step_00000010"
    (path / "MANIFEST.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: damaged"):
        verify_checkpoint(path)


def test_another_spelling_of_the_same_manifest_is_noticed(folder):
    path = folder / "step_00000010" / "MANIFEST.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: damaged"):
        verify_checkpoint(path.parent)


def test_a_launcher_looks_without_torch():
    program = (
        "import sys, disttrain.preflight, disttrain.runs.manifest\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
