"""Packing: what is written, what is refused, and what an interruption leaves."""

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from disttrain.errors import DataError, StorageError, UsageError
from disttrain.shards import pack as packing
from disttrain.shards.imagefolder import pack_folder
from disttrain.shards.images import decode_image
from disttrain.shards.index import load_index
from disttrain.shards.pack import Options
from disttrain.shards.pack import pack as pack_samples
from disttrain.shards.verify import verify
from disttrain.shards.writer import Sample
from kit import REPOSITORY
from kit.commands import wait_for
from kit.marks import nightly
from kit.shards import read_split
from kit.toy import CLASSES, Listed, encode, images, pack, samples, tree


def test_every_pixel_and_label_comes_back(root):
    index = pack()
    for split, seed, count in (("train", 0, 10), ("val", 1, 4)):
        read = list(read_split(index, split))
        assert [key for key, _, _ in read] == [f"{i:08d}" for i in range(count)]
        assert [label for _, _, label in read] == [i % 3 for i in range(count)]
        decoded = np.stack([decode_image(image, 3) for _, image, _ in read])
        np.testing.assert_array_equal(decoded, images(count, seed))


def test_index_says_what_is_there(root):
    index = pack()
    folder = root / "toy"
    assert (index.folder, index.name, index.classes) == (folder, "toy", CLASSES)
    assert (index.channels, index.height, index.width) == (3, 6, 5)
    assert index.splits["train"].class_counts == (4, 3, 3)
    assert index.splits["val"].class_counts == (2, 1, 1)
    assert index.digest == hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    for split in index.splits.values():
        for shard in split.shards:
            data = (folder / shard.file).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(tree(folder)) == ["index.json", "train-000000.tar", "val-000000.tar"]
    assert load_index("toy", None) == index


def test_mean_and_std_are_those_of_the_train_split(root):
    index = pack(train=50)
    pixels = images(50) / 255
    np.testing.assert_allclose(index.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(index.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_constant_images_have_std_zero(root):
    white = Sample(encode(np.full((4, 4), 255, np.uint8)), "png", 0)
    index = pack_samples("white", None, {"train": Listed([white] * 3)}, ["one"], 1, Options())
    assert (index.mean, index.std) == ((1.0,), (0.0,))


def test_same_samples_give_same_bytes(root, tmp_path):
    first = pack(shard_mib=0.01)
    second = pack(root=str(tmp_path / "other"), name="renamed", shard_mib=0.01)
    assert tree(first.folder) == tree(second.folder)
    assert first.digest == second.digest


def test_several_shards_keep_the_order(root):
    index = pack(train=40, shard_mib=0.01)
    of_train = index.splits["train"].shards
    assert len(of_train) > 3
    assert [shard.file for shard in of_train] == [f"train-{i:06d}.tar" for i in range(len(of_train))]
    assert sum(shard.samples for shard in of_train) == 40
    assert [key for key, _, _ in read_split(index, "train")] == [f"{i:08d}" for i in range(40)]


def test_every_caller_reads_every_shard(root, monkeypatch):
    index = pack(train=40, shard_mib=0.01)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("WORKER", "1"), ("NUM_WORKERS", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WDS_CACHE", "/nowhere")
    monkeypatch.setenv("GOPEN_REWRITE", "/=/nowhere/")
    assert len(list(read_split(index, "train"))) == 40


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the library leaves the tar open
def test_shards_are_plain_webdataset(root):
    import webdataset

    index = pack()
    stock = webdataset.WebDataset(str(index.folder / "train-000000.tar"), shardshuffle=False).decode("rgb8")
    read = [(sample["__key__"], sample["png"], sample["cls"]) for sample in stock]
    assert [key for key, _, _ in read] == [f"{i:08d}" for i in range(10)]
    assert [label for _, _, label in read] == [i % 3 for i in range(10)]
    np.testing.assert_array_equal(np.stack([image for _, image, _ in read]), images(10))


def test_tar_members_are_the_same_for_every_user_and_day(root):
    index = pack()
    with tarfile.open(index.folder / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "disttrain", "disttrain", 0o444)
    }


def test_progress_counts_over_all_splits(root):
    seen = []
    pack(train=250, val=4, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(100, 254), (200, 254), (254, 254)]


def test_data_set_is_readable_for_others(root):
    mask = os.umask(0o022)
    try:
        index = pack()
    finally:
        os.umask(mask)
    assert stat.S_IMODE(index.folder.stat().st_mode) == 0o755


class Watched(Listed):
    """Samples that are made when they are loaded, and counted."""

    def __init__(self, count, fail_at=None, error=None):
        super().__init__(samples(images(1)) * count)
        self.loaded = 0
        self.fail_at, self.error = fail_at, error

    def load(self, number):
        self.loaded += 1
        if number == self.fail_at:
            raise self.error
        return super().load(number)


def test_samples_are_taken_as_they_are_needed(root):
    source, ahead = Watched(1000), []

    def watch(done, total):
        ahead.append(source.loaded - done)

    pack_samples("long", None, {"train": source}, CLASSES, 3, Options(on_progress=watch))
    assert max(ahead) <= 1


# --- Refusals of pack -------------------------------------------------------------------------------


def test_existing_data_set_stays(root):
    index = pack()
    with pytest.raises(DataError, match=r"toy: another data set .* --force") as caught:
        pack(seed=7)
    assert caught.value.exit_code == 65
    assert load_index("toy", None) == index
    assert pack() == index
    assert [path.name for path in root.iterdir()] == ["toy"]


def test_force_replaces(root):
    old = pack()
    new = pack(seed=7, train=3, force=True)
    assert new.digest != old.digest
    assert len(list(read_split(new, "train"))) == 3
    assert [path.name for path in root.iterdir()] == ["toy"]


def test_reader_of_a_replaced_shard_is_not_disturbed(root):
    reader = read_split(pack(), "train")
    next(reader)
    pack(seed=7, force=True)
    assert len(list(reader)) == 9


def test_force_spares_what_is_no_data_set(root):
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex: not part of a packed data set; move it away"):
        pack(force=True)
    assert (root / "toy" / "thesis.tex").read_text() == "years of work"


def test_data_set_may_be_a_link_to_another_disk(root, tmp_path):
    (tmp_path / "disk" / "toy").mkdir(parents=True)
    root.mkdir()
    (root / "toy").symlink_to(tmp_path / "disk" / "toy")
    pack(force=True)
    assert (root / "toy").is_symlink()
    assert (tmp_path / "disk" / "toy" / "index.json").is_file()


BROKEN = {
    "no image": Sample(b"hello", "png", 0, "a/b.png"),
    "cut off": Sample(encode(images(1)[0])[:60], "png", 0, "a/b.png"),
    "label": Sample(encode(images(1)[0]), "png", 3, "a/b.png"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sample_is_named_and_nothing_is_left(root, case):
    with pytest.raises(DataError, match=r"^a/b\.png") as caught:
        pack_samples(
            "toy", None, {"train": Listed([*samples(images(3)), BROKEN[case]])}, CLASSES, 3, Options()
        )
    assert "\n" not in str(caught.value)
    assert list(root.iterdir()) == []


def test_several_sizes_make_an_index_of_version_2(root):
    other = Sample(encode(images(1, shape=(70, 5, 3))[0]), "png", 0, "a/b.png")
    train = [*samples(images(2)), other]
    val = samples(images(1))
    index = pack_samples("toy", None, {"train": Listed(train), "val": Listed(val)}, CLASSES, 3, Options())
    assert (index.version, index.stored_height, index.sizes_text()) == (2, None, "5x6 to 5x70")
    assert index.splits["train"].sizes.height == (6, 70)
    assert index.splits["val"].sizes.height == (6, 6)
    assert index.splits["train"].sizes.sides[0] == 3  # the shorter sides are up to 64
    pixels = np.concatenate([decode_image(sample.image, 3).reshape(-1, 3) for sample in train]) / 255
    assert index.mean == pytest.approx(pixels.mean(0))
    assert index.std == pytest.approx(pixels.std(0))
    assert verify(index) == []
    with pytest.raises(UsageError, match=r"toy: .* sizes, 5x6 to 5x70; .*image_size=224"):
        _ = index.height


def test_empty_split_is_refused(root):
    with pytest.raises(DataError, match="the val split has no images"):
        pack_samples(
            "toy", None, {"train": Listed(samples(images(2))), "val": Listed([])}, CLASSES, 3, Options()
        )
    assert not root.exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing(root, stop):
    source = Watched(200, fail_at=150, error=stop)
    with pytest.raises(stop):
        pack_samples("toy", None, {"train": source}, CLASSES, 3, Options())
    assert list(root.iterdir()) == []


def test_failed_write_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*cannot be written.*--root") as caught:
        pack(root=str(tmp_path / "file"))
    assert caught.value.exit_code == 74


PACK_ON_SIGNAL = """
import sys, webdataset
from disttrain.errors import DataError
from disttrain.shards.pack import Options, pack
from disttrain.shards.writer import Sample
from kit import REPOSITORY
from kit.toy import Listed
splits, classes, root = eval(sys.stdin.readline())
print("ready", flush=True)
sys.stdin.readline()
try:
    splits = {name: Listed([Sample(*sample) for sample in samples]) for name, samples in splits.items()}
    print(pack("toy", root, splits, classes, 3, Options()).digest)
except DataError as error:
    print(error)
"""


@pytest.mark.integration
@pytest.mark.parametrize("seeds", [(0, 0), (0, 7)], ids=["same", "different"])
def test_two_processes_at_once(root, seeds):
    command = [sys.executable, "-c", PACK_ON_SIGNAL]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY / "tests"
        )
        for _ in seeds
    ]
    for process, seed in zip(processes, seeds, strict=True):
        splits = {"train": [tuple(sample) for sample in samples(images(60, seed))]}
        process.stdin.write(f"{(splits, CLASSES, str(root))!r}\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [process.communicate(timeout=120)[0].strip() for process in processes]
    index = load_index("toy", None)
    assert verify(index) == []
    assert index.digest in outcomes
    if seeds[0] == seeds[1]:
        assert outcomes == [index.digest] * 2
    else:
        assert any("another data set" in outcome for outcome in outcomes)
    assert [path.name for path in root.iterdir()] == ["toy"]


# --- Several processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 600 images in three classes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(images(600, shape=(24, 24, 3))):
        path = folder / ("val" if number % 6 == 0 else "train") / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image))
    return folder


@pytest.fixture(scope="module")
def many_photos(photos, tmp_path_factory):
    """Enough images that packing is still going on when a test has seen its beginning."""
    folder = tmp_path_factory.mktemp("many")
    for path in photos.rglob("*.png"):
        target = folder / path.relative_to(photos).parent
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(8):
            os.link(path, target / f"{path.stem}-{copy}.png")
    return folder


def pack_photos(folder, name, processes=1, **options):
    return pack_folder(folder, name, None, Options(shard_mib=0.1, processes=processes, **options))


def command(folder, root, *options):
    arguments = ["data", "pack", str(folder), "--name", "photos", "--root", str(root), "--shard-mib", "0.1"]
    return [sys.executable, "-m", "disttrain", *arguments, *options]


def wait_for_records(scratch, count, process):
    wait_for(lambda: len(list(scratch.glob("*.json"))) >= count, process)


@pytest.mark.integration
@pytest.mark.parametrize("processes", [2, *nightly(3)])
def test_any_number_of_processes_writes_the_same_bytes(root, photos, processes):
    done = []
    one = pack_photos(photos, "one")
    several = pack_photos(photos, "several", processes, on_progress=lambda *seen: done.append(seen))
    assert len(one.splits["train"].shards) > 10
    assert tree(one.folder) == tree(several.folder)
    assert done[-1] == (600, 600)
    assert [count for count, _ in done] == sorted(count for count, _ in done)


@pytest.mark.integration
def test_a_wrong_image_is_named_by_whatever_process_finds_it(root, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    broken = tmp_path / "copy" / "train" / "emu" / "599.png"
    sound = broken.read_bytes()
    broken.write_bytes(encode(images(1, shape=(24, 24, 3))[0], "JPEG")[:-50])  # its header is sound
    with pytest.raises(DataError, match=r"emu/599\.png: .*; repair or remove it"):
        pack_photos(tmp_path / "copy", "photos", 2)
    broken.write_bytes(sound)
    index = pack_photos(tmp_path / "copy", "photos", 2)
    assert tree(index.folder) == tree(pack_photos(photos, "other").folder)
    assert sorted(path.name for path in root.iterdir()) == ["other", "photos"]


@pytest.mark.integration
@pytest.mark.parametrize("processes", [1, *nightly(2)])
def test_packing_goes_on_after_it_was_killed(root, many_photos, processes):
    arguments = command(many_photos, root, "--procs", str(processes))
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        scratch = root / ".photos.partial"
        wait_for_records(scratch, 3, process)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    kept = {path.with_suffix(".tar").name for path in scratch.glob("*.json")}
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in scratch.glob("*.tar")}
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=True)
    assert f"resuming: {len(kept)} of" in result.stdout
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (root / "photos").iterdir()}
    assert all(after[name] == before[name] for name in kept)
    assert tree(root / "photos") == tree(pack_photos(many_photos, "other").folder)
    assert sorted(path.name for path in root.iterdir()) == ["other", "photos"]


@pytest.mark.integration
def test_ctrl_c_ends_all_processes_and_keeps_what_is_finished(root, many_photos):
    arguments = command(many_photos, root, "--procs", "2")
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for_records(root / ".photos.partial", 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert len(list((root / ".photos.partial").glob("*.json"))) >= 2


@pytest.mark.integration
def test_a_killed_packing_process_is_told(root, many_photos):
    arguments = command(many_photos, root, "--procs", "2")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_records(root / ".photos.partial", 2, process)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 74, errors
    assert "a packing process was killed" in errors


@pytest.mark.integration
def test_a_changed_image_is_packed_anew(root, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    broken = tmp_path / "copy" / "val" / "cat" / "0.png"
    broken.write_bytes(encode(images(1, shape=(24, 24, 3))[0], "JPEG")[:-50])  # its header is sound
    with pytest.raises(DataError):
        pack_photos(tmp_path / "copy", "photos")
    scratch = root / ".photos.partial"
    changed = sorted((tmp_path / "copy" / "train" / "dog").iterdir())[0]
    changed.write_bytes(encode(images(1, seed=9, shape=(24, 24, 3))[0]))
    broken.write_bytes(encode(images(1, shape=(24, 24, 3))[0]))
    finished = len(list(scratch.glob("*.json")))
    said = []
    index = pack_photos(tmp_path / "copy", "photos", say=said.append)
    assert f"resuming: {finished - 2} of" in said[1]  # all but the shards of the two images
    assert changed.read_bytes() in {image for _, image, _ in read_split(index, "train")}
    assert verify(index) == []


def test_a_full_disk_is_told_before_packing(root, photos, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"the shards need [12] MiB, but only 0 MiB are free"):
        pack_photos(photos, "photos")


# --- Imports ----------------------------------------------------------------------------------------


def test_import_is_light():
    heavy = "{'torch', 'torchvision', 'webdataset'}"
    code = f"import disttrain.shards.datasets, sys; print({heavy} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY / "tests")
    assert run.stdout.strip() == "set()"
