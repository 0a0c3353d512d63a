"""Verifying a data set against its index, and finding what cannot be used."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from disttrain.shards import verify as module
from disttrain.shards.existing_tars import index_folder
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options
from disttrain.shards.verify import find_bad_samples, verify
from kit.shards import write_tar
from kit.toy import edit_index, pack


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root, which is the default one, with a cache of its own."""
    monkeypatch.setenv("DISTTRAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data"


def quiet(text):
    pass


def with_bad_labels(root, bad=(2, 5)):
    """Makes `set` with some samples whose label is not a number."""
    write_tar(root / "set" / "train-0.tar", 8, seed=0)
    write_tar(root / "set" / "val-0.tar", 3, seed=1)
    content = (root / "set" / "train-0.tar").read_bytes()
    for number in bad:
        place = content.index(f"0-{number}.cls".encode()) + 512
        place -= place % 512
        content = content[:place] + b"x" + content[place + 1 :]
    (root / "set" / "train-0.tar").write_bytes(content)
    index_folder(root / "set", {"train": (), "val": ()}, Options(), skip_unusable=True)
    return load_index("set", str(root))


def test_a_sound_data_set_has_no_problems_and_is_counted_through(root):
    seen = []
    assert verify(pack(), on_progress=lambda *progress: seen.append(progress)) == []
    assert seen[-1] == (14, 14)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(mean=[0.5, 0.5, 0.5]), "mean or std"),
        (lambda content: content["splits"]["val"].update(class_counts=[1, 2, 1]), "class_counts of val"),
    ],
)
def test_an_index_that_is_wrong_about_its_shards_is_told(root, change, words):
    pack()
    edit_index(root / "toy", change)
    (problem,) = verify(load_index("toy", None))
    assert problem.place == str(root / "toy" / "index.json")
    assert words in problem.text


def test_every_problem_is_told(root):
    index = with_bad_labels(root)
    (root / "set" / "extra.tar").write_bytes(b"")
    assert [(Path(place).name, key) for place, key, _ in verify(index)] == [
        ("train-0.tar", "some/folder/0-2"),
        ("train-0.tar", "some/folder/0-5"),
        ("extra.tar", None),
    ]


def test_what_cannot_be_used_is_looked_for_once(root, monkeypatch):
    index = with_bad_labels(root)
    said = []
    assert find_bad_samples(index, "train", said.append).tolist() == [2, 5]
    assert [text.partition(":")[0] for text in said[1:]] == ["skipped"] * 2
    monkeypatch.setattr(module, "examine", None)
    assert find_bad_samples(index, "train", said.append).tolist() == [2, 5]
    assert len(said) == 3


def test_it_is_looked_for_again_when_a_shard_changes(root):
    index = with_bad_labels(root)
    find_bad_samples(index, "train", quiet)
    path = root / "set" / "train-0.tar"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + b"x")
    assert find_bad_samples(index, "train", quiet).tolist() == list(
        range(8)
    )  # its hash is wrong: all are left out
    path.unlink()
    assert find_bad_samples(index, "train", quiet).tolist() == list(range(8))
    path.write_bytes(kept)
    assert find_bad_samples(index, "train", quiet).tolist() == [2, 5]


def test_processes_that_look_at_once_look_once(root):
    with_bad_labels(root)
    program = f"""
from disttrain.shards.index import load_index
from disttrain.shards.verify import find_bad_samples
print(find_bad_samples(load_index("set", {str(root)!r}), "train", print).tolist())
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [output.splitlines()[-1] for output in outputs] == ["[2, 5]"] * 3
    assert sum("looking for bad samples" in output for output in outputs) == 1


def test_a_cache_that_cannot_be_written_is_no_obstacle(root, monkeypatch, tmp_path):
    index = with_bad_labels(root)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert find_bad_samples(index, "train", quiet).tolist() == [2, 5]


def test_the_command_lists_the_problems_and_ends_with_65(disttrain, root):
    with_bad_labels(root)
    result = disttrain("data", "verify", "set", "--root", root)
    assert result.returncode == 65
    assert f"{root}/set/train-0.tar: sample some/folder/0-2: b'x' is not a label" in result.stdout
    assert "set: 2 problems; get the file again, then run `disttrain data index" in result.stderr


@pytest.mark.nightly
def test_the_stages_of_the_data_path_are_measured(disttrain):
    result = disttrain("data", "bench", "digits", "--samples", "300", "--batch-size", "64", "--json")
    assert result.returncode == 0, result.stderr
    stages = json.loads(result.stdout)
    names = [stage["name"] for stage in stages]
    assert list(dict.fromkeys(names)) == [
        *("check", "scan", "read", "decode", "decode once", "plan", "batch", "augment"),
        *("cached epoch", "streamed epoch", "stock webdataset"),
    ]
    assert all(np.isfinite(stage["samples_per_s"]) and stage["samples_per_s"] > 0 for stage in stages)
