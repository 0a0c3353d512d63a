"""What is checked before anything starts."""

import json

import pytest

from disttrain.config import Config, dump_config
from disttrain.errors import CheckpointError, DataError, UsageError
from disttrain.preflight import check_device, find_checkpoint, open_index, resume_point, split_batch
from disttrain.runfolder import RunFolder


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
        document[section] = document[section] | values
    return Config.model_validate(document)


def make_checkpoint(folder, step):
    """Makes what counts as a checkpoint here: a folder with a manifest."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "MANIFEST.json").write_text("{}")
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
            "model.num_classes = 7, but digits has 10 classes; set it to that or leave it out",
        ),
        (
            {"augment": {"crop_padding": 8}},
            "augment.crop_padding = 8 is too much for images of 8x8; at most 7",
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
    assert resume_point(RunFolder(tmp_path / "new"), resume, experiment()) == (None, False)


def test_an_unfinished_run_goes_on_from_its_latest_checkpoint(folder):
    folder.update_status(state="stopped")
    checkpoint, finished = resume_point(folder, "auto", experiment())
    assert checkpoint is not None
    assert (checkpoint.resolve().name, finished) == ("step_00000020", False)


def test_a_run_without_a_checkpoint_begins_again(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text(dump_config(experiment()))
    assert resume_point(folder, "auto", experiment()) == (None, False)


def test_a_finished_run_is_not_continued(folder):
    folder.update_status(state="finished")
    assert resume_point(folder, "auto", experiment())[1]


def test_a_run_that_must_not_be_continued(folder):
    with pytest.raises(UsageError, match=r"run: holds a run; choose another --run-dir or --resume auto$"):
        resume_point(folder, "never", experiment())


def test_a_run_may_go_on_with_other_trackers(folder, tmp_path):
    changed = experiment(monitor={"trackers": ["wandb"], "prometheus_dir": str(tmp_path)})
    assert resume_point(folder, "auto", changed)[0] is not None


def test_a_run_of_another_config(folder):
    changed = experiment(optim={"lr": 0.2}, train={"epochs": 3})
    with pytest.raises(UsageError) as caught:
        resume_point(folder, "auto", changed)
    assert str(caught.value) == (
        f"{folder.path}: holds a run of another config (optim.lr: 0.1 -> 0.2; train.epochs: 2 -> 3); "
        "undo the change or choose another --run-dir"
    )


@pytest.mark.parametrize("given", ["run", "run/checkpoints/step_00000020", "run/checkpoints/latest"])
def test_a_new_run_can_begin_with_a_checkpoint_of_another(folder, given):
    new = RunFolder(folder.path.parent / "new")
    checkpoint, finished = resume_point(new, str(folder.path.parent / given), experiment(train={"epochs": 9}))
    assert checkpoint is not None
    assert (checkpoint.resolve().name, finished) == ("step_00000020", False)


def test_a_run_can_go_back_to_an_earlier_checkpoint_of_its_own(folder):
    earlier = folder.checkpoints / "step_00000010"
    assert resume_point(folder, str(earlier), experiment()) == (earlier, False)


def test_a_run_does_not_take_up_a_checkpoint_of_another(folder, tmp_path):
    other = make_checkpoint(tmp_path / "other", 5)
    with pytest.raises(
        UsageError, match=r"run: holds a run already; choose another --run-dir or --resume auto"
    ):
        resume_point(folder, str(other), experiment())


def test_a_path_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        resume_point(RunFolder(tmp_path / "run"), str(tmp_path), experiment())
    assert (
        str(caught.value) == f"--resume {tmp_path}: neither a run folder with a checkpoint nor a checkpoint"
    )


@pytest.mark.parametrize("target", ["step_00000099", None], ids=["dangling", "missing"])
def test_without_a_good_link_the_newest_checkpoint_counts(folder, target):
    link = folder.checkpoints / "latest"
    link.unlink()
    if target:
        link.symlink_to(target)
    (folder.checkpoints / "step_00000030").mkdir()  # a save that did not come to its end
    assert find_checkpoint(folder.path) == folder.checkpoints / "step_00000020"


def test_the_link_counts_more_than_the_number(folder):
    link = folder.checkpoints / "latest"
    link.unlink()
    link.symlink_to("step_00000010")
    found = find_checkpoint(folder.path)
    assert found is not None
    assert found.resolve().name == "step_00000010"


def test_no_checkpoint_in_a_file_or_an_empty_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text(json.dumps({}))
    assert find_checkpoint(file) is None
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "missing") is None
