"""`disttrain export`: files that compute what the network does, and cards whose programs run."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import load_model as stock_load_model

from disttrain.errors import DisttrainError, UsageError
from disttrain.inference import exporting
from disttrain.inference.classifier import load_model
from disttrain.inference.exporting import SUFFIXES, export
from disttrain.inference.prediction import predict
from disttrain.runs import checkpoint
from disttrain.shards.images import decode_image
from disttrain.shards.index import load_index
from kit.commands import Run, succeeded
from kit.marks import nightly
from kit.shards import read_split

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="needs the extra disttrain[onnx]"
)
FORMATS: list[Any] = ["safetensors", "torch-export", pytest.param("onnx", marks=needs_onnx)]


@pytest.fixture(scope="module")
def images(digits_root: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Some images of the validation split, uint8 [B, 8, 8, 1]."""
    samples = list(read_split(load_index("digits", str(digits_root)), "val"))[:50]
    return np.stack([decode_image(image, 1) for _, image, _ in samples])


@pytest.mark.parametrize(
    "file_format",
    [
        "safetensors",
        *nightly("torch-export"),
        pytest.param("onnx", marks=[needs_onnx, pytest.mark.nightly]),
    ],
)
def test_an_export_is_checked_and_its_card_has_a_program_that_runs(
    disttrain: Run, trained_run: Path, images: Any, tmp_path: Path, file_format: Any
) -> None:
    path = tmp_path / "out" / f"net{SUFFIXES[file_format]}"
    done = disttrain("export", trained_run, "--format", file_format, "--output", path)
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(
        rf"{re.escape(str(path))}: logits differ by at most (\S+) on 256 images\n", done.stdout
    )
    assert found
    assert float(found[1]) < 1e-4
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["README.md", path.name]
    card = (path.parent / "README.md").read_text()
    record = json.loads((trained_run / "metrics.jsonl").read_text().splitlines()[-1])
    step = load_model(trained_run).step
    if record["step"] == step:
        assert f"{100 * record['accuracy']:.2f} % ({record['correct']} of 359)" in card
    assert "`digits`: 1,438 train, 359 val" in card
    assert '["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]' in card
    files = []
    for number, image in enumerate(images[:5]):
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(image[..., 0]).resize((30, 20), Image.Resampling.BICUBIC).save(files[-1])
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *files],
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert shown.returncode == 0, shown.stderr
    for line, prediction in zip(shown.stdout.splitlines(), predict(trained_run, files), strict=True):
        image, label, probability = line.split()
        assert (image, label) == (prediction.image, prediction.label)
        assert float(probability) == pytest.approx(prediction.probability, abs=1e-4)


def run_torch_export(path: Path) -> Callable[[Any], Any]:
    module: Any = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


def run_onnx(path: Path) -> Callable[[Any], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda images: session.run(None, {"images": images})[0]


def run_safetensors(path: Path) -> Callable[[Any], Any]:
    model = load_model(path)
    return lambda images: model(torch.from_numpy(images)).detach().numpy()


@pytest.mark.parametrize("file_format", FORMATS)
def test_any_number_of_raw_images_gives_the_scores_of_the_moving_average(
    trained_run: Path, digits_root: Path, images: Any, tmp_path: Path, file_format: Any
) -> None:
    done = export(trained_run, file_format, tmp_path / f"net{SUFFIXES[file_format]}")
    run = {"torch-export": run_torch_export, "onnx": run_onnx, "safetensors": run_safetensors}[file_format]
    scores = run(done.path)
    index = load_index("digits", str(digits_root))
    weights = checkpoint.load(trained_run / "checkpoints" / "best").parts["ema"]
    network = load_model(trained_run).network.double()
    network.load_state_dict(
        {key.removeprefix("module."): weights[key] for key in weights if "module." in key}
    )
    normalized = (torch.from_numpy(images).double() / 255 - index.mean[0]) / index.std[0]
    expected = network(normalized.permute(0, 3, 1, 2)).detach().numpy()
    for count in (1, 2, 50):
        assert np.abs(scores(images[:count]) - expected[:count]).max() < 1e-4


def test_a_safetensors_file_holds_only_the_average_and_says_its_use(
    trained_run: Path, tmp_path: Path
) -> None:
    done = export(trained_run, "safetensors", tmp_path / "net.safetensors")
    weights = checkpoint.load(trained_run / "checkpoints" / "best").parts["ema"]
    held = load_file(done.path)
    assert {f"module.{name}" for name in held} | {"n_averaged"} == weights.keys()
    assert all(torch.equal(value, weights[f"module.{name}"]) for name, value in held.items())
    model = load_model(done.path)
    assert model.classes == tuple("0123456789")
    assert model.facts == load_model(trained_run).facts


def test_an_archive_of_torch_export_holds_no_pickle(trained_run: Path, tmp_path: Path) -> None:
    done = export(trained_run, "torch-export", tmp_path / "net.pt2")
    with zipfile.ZipFile(done.path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert any("weight" in name for name in members)
    opened = [name for name, data in members.items() if data[:1] == b"\x80" or data[:2] == b"PK"]
    assert opened == []


@needs_onnx
def test_an_onnx_file_says_what_it_takes_and_gives(trained_run: Path, tmp_path: Path) -> None:
    import onnxruntime

    done = export(trained_run, "onnx", tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(done.path)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [8, 8, 1])
    assert (given.name, given.type, given.shape[1:]) == ("logits", "tensor(float)", [10])
    assert isinstance(taken.shape[0], str), "the size of the batch is free"
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list("0123456789")
    assert json.loads(about["disttrain"])["mean"] == list(load_model(trained_run).facts.mean)
    assert about["input"] == "images: uint8 [B, 8, 8, 1], gray 0..255, any B"


TIED = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, num_classes)
        self.register_buffer("part", self.head.weight.detach()[:2])

    def forward(self, images):
        return self.head(torch.relu(self.second(torch.relu(self.first(images.flatten(1))))))
"""


@pytest.mark.nightly
def test_tied_weights_are_exported_and_read_back(
    disttrain: Run, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tied.py").write_text(TIED)
    run = ["run", config_file, "model.name=tied:Tied", "train.epochs=1", "--procs", 1, "--run-dir"]
    assert succeeded(disttrain(*run, "run"))
    done = disttrain("export", "run", "--format", "safetensors", "--output", "out/net.safetensors")
    assert succeeded(done)
    assert "on 256 images" in done.stdout
    path = tmp_path / "out/net.safetensors"
    assert load_file(path).keys() == {
        "first.weight", "first.bias", "second.bias", "head.weight", "head.bias", "part",
    }  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    trained, stock = load_model(tmp_path / "run"), load_model(tmp_path / "run")
    with torch.no_grad():
        stock.network.first.weight.zero_()
    stock_load_model(stock.network, path, strict=False)  # by name, it takes `part` for a tied weight
    images = torch.randint(0, 256, (5, 8, 8, 1), dtype=torch.uint8)
    for model in (load_model(path), stock):
        assert torch.equal(model(images), trained(images))
    assert succeeded(disttrain(*run, "again", f"model.weights={path}"))
    assert f"{path}: all" in (tmp_path / "again/env.json").read_text()


# --- Refusals ---------------------------------------------------------------------------------------


def test_a_file_that_computes_something_else_does_not_stay(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting._WRITERS["safetensors"]

    def careless(classifier: Any, path: Path, opset: int | None) -> Any:
        with torch.no_grad():
            next(classifier.network.parameters()).mul_(1.01)
        scores = write(classifier, path, opset)
        with torch.no_grad():
            next(classifier.network.parameters()).div_(1.01)
        return scores

    monkeypatch.setitem(exporting._WRITERS, "safetensors", careless)
    with pytest.raises(DisttrainError, match=r"not written: its logits differ by \S+ .* more than") as caught:
        export(trained_run, "safetensors", tmp_path / "net.safetensors")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_exported_is_one_line(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(
        DisttrainError, match=r"cnn_mnist cannot be exported as torch-export: .*no such operator"
    ):
        export(trained_run, "torch-export", tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_missing_extra_is_named(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )
    with pytest.raises(UsageError, match=r"pip install 'disttrain\[onnx\]'"):
        export(trained_run, "onnx", tmp_path / "net.onnx")


def test_a_readme_of_somebody_else_is_left_alone(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mine\n")
    with pytest.raises(UsageError, match="exists and is not a model card"):
        export(trained_run, "safetensors", tmp_path / "net.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    with pytest.raises(UsageError, match=r"expected a name that ends in \.pt2"):
        export(trained_run, "torch-export", tmp_path / "out" / "net.onnx")


def test_without_a_name_it_goes_into_the_run_folder_and_may_be_repeated(
    trained_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    for _ in range(2):
        done = export(run, "safetensors", checkpoint="latest")
        assert done.path == run / "export" / "safetensors" / "model.safetensors"
        assert (done.path.parent / "README.md").exists()
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"({record['correct']} of 359)" in (done.path.parent / "README.md").read_text()


@pytest.mark.nightly
@needs_onnx
def test_the_batch_axis_of_onnx_has_its_name_and_the_opset_is_chosen(
    disttrain: Run, trained_run: Path, tmp_path: Path
) -> None:
    import onnx

    path = tmp_path / "out" / "net.onnx"
    command = ["export", trained_run, "--format", "onnx", "--output", path]
    done = disttrain(*command, "--opset", "19")
    assert (done.returncode, done.stderr) == (0, "")
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import] == [19]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(dim.dim_param.startswith("s") for value in model.graph.value_info
                   for dim in value.type.tensor_type.shape.dim)  # fmt: skip
    path.unlink()
    done = disttrain(*command, "--opset", "5")
    assert (done.returncode, done.stdout) == (2, "")
    found = re.fullmatch(
        r"disttrain: --opset 5: torch \S+ cannot write cnn_mnist with it; use --opset (\d+)\n", done.stderr
    )
    assert found
    assert int(found[1]) <= 19  # which was just written
    assert not path.exists()
    done = disttrain("export", trained_run, "--format", "safetensors", "--opset", "19")
    assert (done.returncode, done.stderr) == (
        2, "disttrain: --opset 19: --format safetensors has none; leave it out, or use --format onnx\n",
    )  # fmt: skip
