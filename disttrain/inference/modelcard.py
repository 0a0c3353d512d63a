"""The model card: README.md beside an exported model, with a program that uses the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from disttrain import __version__
from disttrain.errors import UsageError
from disttrain.inference.run import Facts, Trained
from disttrain.runs.evaluation import evaluation_of
from disttrain.runs.manifest import read_state
from disttrain.shards.index import Index
from disttrain.units import accuracy_text, number, percent

NAME = "README.md"
_MARK = "<!-- model card, written by disttrain export -->"

_WITH_DISTTRAIN = """\
import sys

import disttrain

for prediction in disttrain.predict({file}, sys.argv[1:]):
    print(prediction.image, {what})
"""
_WITHOUT = '''\
import json
import sys

import numpy as np
import {package}
from PIL import Image, ImageOps


def pixels(path):
    """Returns the pixels of an image file: uint8 [1, {height}, {width}, {channels}]."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("{mode}")
{fit}
    return np.array(image).reshape(1, {height}, {width}, {channels})


{load}
for path in sys.argv[1:]:
    scores = {scores}
{show}
'''
_BEST = """\
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    best = int(probabilities.argmax())
    print(path, classes[best], float(probabilities[best]))"""
_EVERY = """\
    probabilities = 1 / (1 + np.exp(-scores))
    labels = [(classes[label], float(probabilities[label])) for label in np.flatnonzero(scores >= 0)]
    print(path, *labels)"""
_COVER = """\
    scale = max({width} / image.width, {height} / image.height)
    left, top = max(0, image.width - {width} / scale) / 2, max(0, image.height - {height} / scale) / 2
    box = (left, top, image.width - left, image.height - top)
    image = image.resize(({width}, {height}), Image.Resampling.BICUBIC, box, reducing_gap=4.0)"""
_CROP = """\
    side = max(1, round({crop_pct} * min(image.size)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)"""
_PROGRAMS = {
    "torch-export": {
        "package": "torch",
        "load": """\
about = {{"disttrain.json": ""}}
network = torch.export.load({file}, extra_files=about).module()
classes = json.loads(about["disttrain.json"])["classes"]""",
        "scores": "network(torch.from_numpy(pixels(path)))[0].detach().numpy()",
    },
    "onnx": {
        "package": "onnxruntime",
        "load": """\
session = onnxruntime.InferenceSession({file})
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])""",
        "scores": 'session.run(["logits"], {{"images": pixels(path)}})[0][0]',
    },
}


def check_place(folder: Path) -> None:
    """Raises UsageError if a folder contains a README.md that is not a model card."""
    path = folder / NAME
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"{path}: exists and is not a model card; choose an --output in another folder")


def input_text(facts: Facts) -> str:
    """Returns a description of the input of an exported model."""
    colors = "gray" if facts.channels == 1 else "RGB"
    return f"images: uint8 [B, {facts.height}, {facts.width}, {facts.channels}], {colors} 0..255, any B"


def output_text(facts: Facts) -> str:
    """Returns a description of the output of an exported model."""
    if facts.multi_label:
        return "logits: float32 [B, classes]; the sigmoid of each is the probability of this label"
    return "logits: float32 [B, classes]; their softmax gives the probabilities of the classes"


def card(trained: Trained, file_format: str, file: str, index: Index, difference: float, images: int) -> str:
    """Returns the model card of an exported file; `difference` is that of its logits on so many images."""
    facts = trained.facts
    rows = {
        "file": f"`{file}` ({file_format})",
        "check": f"logits differ by at most {difference:.2g} from the trained model's on {images} images",
        "network": f"`{facts.model}` {json.dumps(facts.args) if facts.args else ''}".rstrip(),
        **_training(trained),
        "data": f"`{facts.data}`: "
        + ", ".join(f"{split.samples:,} {name}" for name, split in index.splits.items()),
        "input": input_text(facts),
        "preprocessing": _preprocessing(facts, inside=file_format != "safetensors"),
        "output": output_text(facts),
        "made with": f"disttrain {__version__}",
    }
    table = "\n".join(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows.items())
    return f"""{_MARK}
# {trained.config.name}

| | |
|---|---|
{table}

## Classes

In the order of the logits:

```json
{json.dumps(facts.classes, ensure_ascii=False)}
```

## Use

    python classify.py IMAGE...

with `classify.py`:

```python
{_program(facts, file_format, json.dumps(file)).strip()}
```
"""


def _program(facts: Facts, file_format: str, file: str) -> str:
    """Returns the program that uses an exported file; `file` is its name as a Python literal."""
    if file_format == "safetensors":
        what = "prediction.labels" if facts.multi_label else "prediction.label, prediction.probability"
        return _WITH_DISTTRAIN.format(file=file, what=what)
    fields = {name: text.format(file=file) for name, text in _PROGRAMS[file_format].items()}
    shape = {"height": facts.height, "width": facts.width, "channels": facts.channels}
    fit = _COVER if facts.crop_pct is None else _CROP
    fields["fit"] = fit.format(crop_pct=facts.crop_pct, **shape)
    fields["show"] = _EVERY if facts.multi_label else _BEST
    return _WITHOUT.format(mode="L" if facts.channels == 1 else "RGB", **shape, **fields)


def _training(trained: Trained) -> dict[str, str]:
    """Returns the rows on training and accuracy."""
    state = read_state(trained.checkpoint)
    found = evaluation_of(trained.checkpoint)
    accuracy = "not evaluated at this step"
    if found is not None:
        result = found.record
        share = accuracy_text(result.accuracy, result.correct, result.total)
        accuracy = f"{share} of the validation split"
        if result.map is not None:
            accuracy = f"mAP {percent(result.map)}; all labels correct in {accuracy}"
        accuracy += f", loss {number(result.loss, '.4f')}"
        if result.macro_f1 is not None:
            accuracy += f", macro F1 {percent(result.macro_f1)}"
        if result.calibration_error is not None:
            accuracy += f", expected calibration error {percent(result.calibration_error)}"
        if result.tta is not None:
            accuracy += f", with test-time augmentation ({result.tta})"
    train = trained.config.train
    ema = f", moving average of the weights with decay {train.ema}" if train.ema else ""
    steps = f"{state['epoch']} epochs, {state['step']:,} steps of {train.batch_size}{ema}"
    rows = {"accuracy": accuracy, "training": steps}
    if (began := state.get("initial_weights")) is not None:
        rows["initial weights"] = f"{began['source']}, SHA-256 of the loaded tensors {began['sha256']}"
    return rows


def _preprocessing(facts: Facts, *, inside: bool) -> str:
    numbers: list[Any] = [[round(value, 6) for value in values] for values in (facts.mean, facts.std)]
    where = "inside the network" if inside else "by `disttrain.load_model`, from the header of the file"
    size = f"{facts.height}x{facts.width} pixels"
    fit = f"resized to cover {size} (bicubic) and center-cropped"
    if facts.crop_pct is not None:
        fit = f"a square in the center, {facts.crop_pct:g} of the shorter side, resized to {size} (bilinear)"
    return f"{fit}; then, {where}: scaled to 0..1, minus the mean {numbers[0]}, divided by {numbers[1]}"
