"""What is checked before anything starts."""

import shutil
from types import SimpleNamespace

import pytest

from disttrain.config import Config, Role, dump_config, role, settings
from disttrain.errors import CheckpointError, DataError, StorageError, UsageError
from disttrain.files import free_bytes
from disttrain.preflight import (
    check_device,
    check_reproducible,
    check_room,
    check_shared_memory,
    check_space,
    open_index,
    split_batch,
)
from disttrain.runs.fingerprint import changes_since, fingerprint
from disttrain.runs.manifest import STATE, canonical, entry, write_manifest
from disttrain.runs.resume import Start, resume_point
from disttrain.runs.runfolder import RunFolder
from disttrain.shards.index import Index


def experiment(**changes):
    """Returns a config; `changes` are sections to update."""
    document = {
        "name": "tiny",
        "data": {"name": "digits"},
        "augment": {},
        "model": {"name": "cnn_mnist"},
        "train": {"epochs": 2, "batch_size": 64},
        "optim": {"lr": 0.1},
        "monitor": {},
    }
    for section, values in changes.items():
        document[section] = document.get(section, {}) | values
    return Config.model_validate(document)


INDEX = SimpleNamespace(
    name="digits",
    digest="d" * 64,
    splits={
        "train": SimpleNamespace(
            samples=30, shards=[SimpleNamespace(samples=10), SimpleNamespace(samples=20)]
        ),
        "val": SimpleNamespace(samples=5, shards=[SimpleNamespace(samples=5)]),
    },
)


def now(index=INDEX, **changes):
    """Returns the identity of a run with the experiment, changed as said."""
    return fingerprint(experiment(**changes), index)


def make_checkpoint(folder, step, saved=None):
    """Makes a sound checkpoint without weights."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    state = {"step": step} | (now() if saved is None else saved)
    data = canonical({"state": state, "parts": {}})
    (path / STATE).write_bytes(data)
    write_manifest(path, {STATE: entry(STATE, data)})
    return path


@pytest.fixture
def folder(tmp_path):
    """A run folder with a config and the checkpoints of steps 10 and 20, the later one linked."""
    folder = RunFolder(tmp_path / "run")
    make_checkpoint(folder.path, 10)
    make_checkpoint(folder.path, 20)
    (folder.checkpoints / "latest").symlink_to("step_00000020")
    folder.config.write_text(dump_config(experiment()))
    return folder


# --- Batch and device -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "world", "accumulate", "samples"), [(64, 1, 1, 64), (64, 4, 1, 16), (64, 4, 2, 8), (8, 8, 1, 1)]
)
def test_each_process_takes_its_share_of_the_batch(batch, world, accumulate, samples):
    config = experiment(train={"batch_size": batch, "accumulate": accumulate})
    assert split_batch(config, world) == samples


@pytest.mark.parametrize(
    ("train", "world", "words"),
    [
        ({}, 8, 8),
        ({}, 5, 8),
        ({"virtual_ranks": 4, "accumulate": 7}, 1, 16),
        ({}, 9, "9 processes are more than train.virtual_ranks = 8; use at most 8"),
        ({"batch_size": 60}, 2, "train.batch_size of 56 or 64, or a train.virtual_ranks of 1, 2, 3, 4, 5,"),
    ],
)  # fmt: skip
def test_virtual_ranks_share_the_batch(train, world, words):
    config = experiment(train={"reproducible": True} | train)
    if isinstance(words, int):
        assert split_batch(config, world) == words
    else:
        with pytest.raises(UsageError) as caught:
            split_batch(config, world)
        assert words in str(caught.value)


def test_a_compiler_is_refused_where_the_bits_are_promised():
    with pytest.raises(UsageError, match=r"set train\.compile=false"):
        check_reproducible(experiment(train={"reproducible": True, "compile": True}).train)
    check_reproducible(experiment(train={"compile": True}).train)


@pytest.mark.parametrize(
    ("batch", "world", "accumulate", "message"),
    [
        (64, 3, 1, "train.batch_size = 64 cannot be divided by 3 processes; use a train.batch_size of 63 "
                   "or 66, or 1, 2, 4, 8, 16, 32, 64 processes"),
        (4, 8, 1, "train.batch_size = 4 cannot be divided by 8 processes; use a train.batch_size of 8, "
                  "or 1, 2, 4 processes"),
        (64, 3, 2, "train.batch_size = 64 cannot be divided by 3 processes x train.accumulate = 2; "
                   "use a train.batch_size of 60 or 66, or 1, 2, 4, 8, 16, 32 processes"),
        (1, 2, 1, "train.batch_size = 1 cannot be divided by 2 processes; use a train.batch_size of 2, "
                  "or 1 process"),
        (64, 1, 5, "train.batch_size = 64 cannot be divided by 1 process x train.accumulate = 5; "
                   "use a train.batch_size of 60 or 65"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_divided(batch, world, accumulate, message):
    with pytest.raises(UsageError) as caught:
        split_batch(experiment(train={"batch_size": batch, "accumulate": accumulate}), world)
    assert str(caught.value) == message


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_arithmetic_that_needs_a_gpu(precision):
    config = experiment(train={"precision": precision})
    with pytest.raises(
        UsageError, match=rf"^train\.precision = {precision} needs a GPU; use bf16, fp32 or auto"
    ):
        check_device(config, "cpu")
    check_device(config, "cuda")


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_arithmetic_that_a_cpu_has(precision):
    check_device(experiment(train={"precision": precision}), "cpu")


# --- Data -------------------------------------------------------------------------------------------


def test_the_digits_are_packed_on_first_use(tmp_path):
    config = experiment(data={"root": str(tmp_path / "data")})
    index = open_index(config, lambda text: None)
    assert (index.splits["train"].samples, index.splits["val"].samples) == (1438, 359)
    before = (index.folder / "index.json").stat().st_mtime_ns
    assert open_index(config, lambda text: None) == index
    assert (index.folder / "index.json").stat().st_mtime_ns == before


def test_another_data_set_is_not_made_silently(tmp_path):
    config = experiment(data={"name": "mnist", "root": str(tmp_path)})
    with pytest.raises(DataError, match="disttrain data prepare mnist"):
        open_index(config, lambda text: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"num_classes": 7}},
            "model.num_classes = 7, but digits has 10 classes; set it to 10 or remove it",
        ),
        (
            {"augment": {"crop_padding": 8}},
            "augment.crop_padding = 8 is too large for images of 8x8; use at most 7",
        ),
    ],
)
def test_a_config_that_does_not_fit_the_data(digits_root, changes, message):
    config = experiment(**{"data": {"root": str(digits_root)}} | changes)
    with pytest.raises(UsageError) as caught:
        open_index(config, lambda text: None)
    assert str(caught.value) == message


@pytest.mark.parametrize("changes", [{"model": {"num_classes": 10}}, {"augment": {"crop_padding": 7}}])
def test_a_config_that_just_fits_the_data(digits_root, changes):
    index = open_index(experiment(**{"data": {"root": str(digits_root)}} | changes), lambda text: None)
    assert (index.name, len(index.classes), index.height, index.width) == ("digits", 10, 8, 8)


# --- Where a run begins -----------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_that_is_not_there_is_a_new_run(tmp_path, resume):
    assert resume_point(RunFolder(tmp_path / "new"), resume, now()) == Start(None)


def test_an_unfinished_run_goes_on_from_its_newest_checkpoint(folder):
    folder.update_status(state="stopped")
    assert resume_point(folder, "auto", now()) == Start(folder.checkpoints / "step_00000020", 20)


def test_a_run_without_its_config_goes_on_all_the_same(folder):
    folder.config.unlink()
    assert resume_point(folder, "auto", now()).checkpoint == folder.checkpoints / "step_00000020"


def test_a_damaged_checkpoint_is_passed_over_and_said(folder):
    (folder.checkpoints / "step_00000020" / STATE).write_text("{}")
    start = resume_point(folder, "auto", now())
    assert start.checkpoint == folder.checkpoints / "step_00000010"
    (note,) = start.notes
    assert note.startswith(
        f"{folder.checkpoints}/step_00000020/state.json: damaged: found 2 bytes with sha256 "
    )


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(folder):
    for step in (10, 20):
        (folder.checkpoints / f"step_000000{step}" / STATE).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is sound"):
        resume_point(folder, "auto", now())
    with pytest.raises(CheckpointError, match="no checkpoint is sound"):
        resume_point(RunFolder(folder.path.parent / "new"), str(folder.path), now())


def test_a_run_without_a_checkpoint_begins_again(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text(dump_config(experiment()))
    start = resume_point(folder, "auto", now())
    assert start == Start(None, notes=(f"{tmp_path}: no checkpoint yet; starting from scratch",))


def test_a_run_that_began_with_anothers_checkpoint_begins_with_it_again(folder, tmp_path):
    new = RunFolder(tmp_path / "new")
    new.path.mkdir()
    new.config.write_text(dump_config(experiment()))
    new.update_status(began_from=str(folder.checkpoints / "step_00000010"))
    assert resume_point(new, "auto", now()).checkpoint == folder.checkpoints / "step_00000010"
    make_checkpoint(new.path, 15)
    assert resume_point(new, "auto", now()).checkpoint == new.checkpoints / "step_00000015"


def test_a_finished_run_is_not_continued(folder):
    folder.update_status(state="finished")
    assert resume_point(folder, "auto", now()) == Start(None, finished=True)
    assert resume_point(folder, "auto", now(data={"cache": "none"})).finished


def test_a_finished_run_goes_on_if_it_is_made_longer(folder):
    folder.update_status(state="finished")
    start = resume_point(folder, "auto", now(train={"epochs": 3}))
    assert start == Start(folder.checkpoints / "step_00000020", 20)


def test_a_run_is_not_made_shorter(folder):
    folder.update_status(state="finished")
    with pytest.raises(UsageError, match=r"train.epochs: 2 -> 1\n"):
        resume_point(folder, "auto", now(train={"epochs": 1}))


def test_a_run_that_must_not_be_continued(folder):
    with pytest.raises(UsageError, match=r"run: holds a run; choose another --run-dir or --resume auto$"):
        resume_point(folder, "never", now())


CHANGED = {"optim": {"lr": 0.2}, "train": {"label_smoothing": 0.1}}


@pytest.mark.parametrize("place", ["own", "elsewhere", "no checkpoint"])
def test_another_config_is_shown_and_refused_unless_forced(folder, tmp_path, place):
    what = f"{folder.checkpoints / 'step_00000020'}: was saved with"
    run, resume = folder, "auto"
    if place == "elsewhere":
        run, resume = RunFolder(tmp_path / "new"), str(folder.path)
    if place == "no checkpoint":
        shutil.rmtree(folder.checkpoints)
        what = f"{folder.path}: holds a run of"
    with pytest.raises(UsageError) as caught:
        resume_point(run, resume, now(**CHANGED))
    assert str(caught.value) == (
        f"{what} another config or data set:\n  optim.lr: 0.1 -> 0.2\n  train.label_smoothing: 0.0 -> 0.1\n"
        "undo the change, choose another --run-dir, or continue anyway with --force"
    )
    start = resume_point(run, resume, now(**CHANGED), force=True)
    assert start.changes == ("optim.lr: 0.1 -> 0.2", "train.label_smoothing: 0.0 -> 0.1")
    assert (start.checkpoint is None) == (place == "no checkpoint")


def test_another_data_set_is_refused(folder):
    other = SimpleNamespace(**vars(INDEX) | {"digest": "e" * 64})
    with pytest.raises(UsageError, match=f"\n  data.digest: {'d' * 64} -> {'e' * 64}\n"):
        resume_point(folder, "auto", now(other))


MAY_DIFFER = {
    *("data.root", "data.cache", "data.workers", "train.cuda_graph", "checkpoint.keep"),
    *("monitor.gpu_interval_s", "monitor.stall_timeout_s", "monitor.trackers", "monitor.prometheus_dir"),
    *("monitor.on_end", "checkpoint.mirror"),
}
MAY_CHANGE = {
    *("data.on_error", "train.epochs", "train.channels_last", "train.compile", "train.accumulate"),
    *("train.trace_samples", "train.stop_early", "eval.every_epochs", "eval.tta", "eval.tta_when"),
    *("eval.crop_pct", "checkpoint.every_epochs", "checkpoint.every_steps", "monitor.log_every_steps"),
}


@pytest.mark.parametrize("key", sorted(settings(experiment())))
def test_what_each_key_may_do(folder, key):
    """A run goes on with another value, or does not; nodes may have another one, or may not."""
    assert settings(experiment()).keys() >= MAY_DIFFER | MAY_CHANGE
    changed = now()
    *sections, last = key.split(".")
    section = changed["config"]
    for name in sections:
        section = section[name]
    section[last] = 3 if key == "train.epochs" else "another"
    if key == "data.name":
        changed["data"]["name"] = "another"
    if key in MAY_DIFFER | MAY_CHANGE:
        assert resume_point(folder, "auto", changed).changes == ()
    else:
        with pytest.raises(UsageError, match=f"\n  {key}: "):
            resume_point(folder, "auto", changed)
    assert (role(key) is Role.MACHINE) == (key in MAY_DIFFER)


def test_samples_that_are_left_out_since_do_not_hold_a_run_back(folder):
    changed = fingerprint(experiment(data={"on_error": "skip"}), INDEX, [3, 4])
    assert resume_point(folder, "auto", changed).changes == ()


@pytest.mark.parametrize("key", ["config", "config_digest", "data", "order"])
def test_a_checkpoint_that_does_not_say_what_it_is_of(folder, key):
    saved = {name: value for name, value in now().items() if name != key}
    make_checkpoint(folder.path, 30, saved)
    with pytest.raises(CheckpointError, match=f"step_00000030: has no {key} in its state"):
        resume_point(folder, "auto", now())


@pytest.mark.parametrize("given", ["run", "run/checkpoints/step_00000020", "run/checkpoints/latest"])
def test_a_new_run_can_begin_with_a_checkpoint_of_another(folder, given):
    new = RunFolder(folder.path.parent / "new")
    start = resume_point(new, str(folder.path.parent / given), now())
    assert start == Start(folder.checkpoints / "step_00000020", 20)


def test_a_run_can_go_back_to_an_earlier_checkpoint_of_its_own(folder):
    earlier = folder.checkpoints / "step_00000010"
    assert resume_point(folder, str(earlier), now()) == Start(earlier, 10)


def test_a_checkpoint_that_is_asked_for_is_the_only_one_that_will_do(folder):
    (folder.checkpoints / "step_00000020" / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"step_00000020/state\.json: missing"):
        resume_point(folder, str(folder.checkpoints / "latest"), now())


def test_a_run_does_not_take_up_a_checkpoint_of_another(folder, tmp_path):
    other = make_checkpoint(tmp_path / "other", 5)
    with pytest.raises(
        UsageError, match=r"run: holds a run already; choose another --run-dir or --resume auto"
    ):
        resume_point(folder, str(other), now())


@pytest.mark.parametrize("name", ["", "run", "run/checkpoints"])
def test_a_path_without_a_checkpoint(tmp_path, name):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        resume_point(RunFolder(tmp_path / "new"), str(tmp_path / name), now())
    assert (
        str(caught.value)
        == f"--resume {tmp_path / name}: neither a run folder with a checkpoint nor a checkpoint"
    )


# --- Identity ---------------------------------------------------------------------------------------


def test_the_identity_of_a_run(digits_root):
    config = experiment(data={"root": str(digits_root)})
    index = open_index(config, lambda text: None)
    found = fingerprint(config, index)
    assert found["config"] == config.model_dump(mode="json")
    assert found["data"] == {
        "name": "digits",
        "digest": index.digest,
        "train": 1438,
        "val": 359,
        "skipped": 0,
        "skipped_digest": None,
    }
    assert len(found["config_digest"]) == len(found["order"]) == 64
    assert isinstance(index, Index)


@pytest.mark.parametrize(
    ("changes", "other_order"),
    [
        ({"optim": {"lr": 0.3}}, False),
        ({"train": {"epochs": 9}}, False),
        ({"train": {"batch_size": 32}}, True),
        ({"data": {"streams": 3}}, True),
        ({"data": {"shuffle_buffer": 3}}, True),
        ({"data": {"remainder": "drop"}}, True),
    ],
)
def test_the_digests_follow_what_they_are_of(changes, other_order):
    before, after = now(), now(**changes)
    assert before["config_digest"] != after["config_digest"]
    assert (before["order"] != after["order"]) == other_order


def test_samples_that_are_left_out_are_part_of_the_identity():
    config = experiment()
    nothing, two, others = (fingerprint(config, INDEX, ids) for ids in ((), (3, 7), (3, 8)))
    assert len({item["order"] for item in (nothing, two, others)}) == 3
    assert [line.partition(":")[0] for line in changes_since(nothing, two)] == [
        "data.skipped",
        "data.skipped_digest",
    ]
    assert [line.partition(":")[0] for line in changes_since(two, others)] == ["data.skipped_digest"]
    assert changes_since(two, fingerprint(config, INDEX, None)) == [], "not known yet"


def test_a_key_that_is_new_in_the_schema_is_no_change():
    saved = now(optim={"betas": [0.9, 0.95], "name": "adam"})
    del saved["config"]["monitor"]
    assert changes_since(saved, now(optim={"betas": [0.9, 0.95], "name": "adam"})) == []
    saved["config"]["train"]["of_old"] = 1
    assert "train.of_old: 1 -> None" in changes_since(saved, now())


# --- Space ------------------------------------------------------------------------------------------


def disk(monkeypatch, free):
    """Makes every disk as full as that."""
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_free_space_is_that_of_the_folder_or_of_where_it_will_be(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_one_further_checkpoint_must_fit(tmp_path, monkeypatch):
    disk(monkeypatch, 999)
    with pytest.raises(StorageError) as caught:
        check_space(tmp_path, 1000, 2)
    assert str(caught.value) == (
        f"{tmp_path}: a checkpoint does not fit: 1,000 bytes needed, 999 bytes free; "
        "free some space or choose another --run-dir"
    )
    disk(monkeypatch, 1000)
    note = check_space(tmp_path, 1000, 2)
    assert note is not None
    assert "1,000 bytes free are enough for only 1 of the 4 further checkpoints" in note
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    disk(monkeypatch, 2000)
    assert check_space(tmp_path / "checkpoints", 1000, 2) is None


@pytest.mark.parametrize("resumed", [False, True])
def test_no_run_begins_on_a_full_disk(folder, monkeypatch, resumed):
    checkpoint = folder.checkpoints / "step_00000020" if resumed else None
    needed = 2**24 + ((checkpoint / STATE).stat().st_size if checkpoint else 0)
    disk(monkeypatch, needed)
    check_room(folder.path, checkpoint)
    disk(monkeypatch, needed - 1)
    with pytest.raises(StorageError, match=f": {needed:,} bytes needed, {needed - 1:,} bytes free; "):
        check_room(folder.path, checkpoint)


def test_shared_memory_is_needed_between_gpus_of_a_node(tmp_path, monkeypatch):
    disk(monkeypatch, 2**26)  # of a container of Docker
    for device, processes in (("cpu", 8), ("cuda", 1), ("cuda", 3)):
        check_shared_memory(device, processes, tmp_path)
    with pytest.raises(StorageError) as caught:
        check_shared_memory("cuda", 4, tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path}: NCCL needs 77,103,104 bytes for 4 GPUs, but 67,108,864 bytes "
    )
    for word in ("--shm-size=1g", "--ipc=host", "NCCL_SHM_DISABLE=1"):
        assert word in str(caught.value)
    monkeypatch.setenv("NCCL_SHM_DISABLE", "1")
    check_shared_memory("cuda", 4, tmp_path)
