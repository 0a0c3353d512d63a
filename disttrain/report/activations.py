"""Predictions and activations of the best checkpoint: the part of the report that needs torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from disttrain.config import Config
from disttrain.data.epoch_plan import Ids
from disttrain.errors import CheckpointError, DisttrainError
from disttrain.parallel import usable_cores
from disttrain.report.pictures import MOST_SIDE, Picture, mosaic, picture_of, stretched
from disttrain.runs.evaluation import MISTAKES, Evaluation, Mistake, evaluation_of
from disttrain.runs.records import EvalRecord
from disttrain.shards.images import Pixels
from disttrain.shards.index import Index
from disttrain.shards.label_format import Labels
from disttrain.shards.reader import Reader

if TYPE_CHECKING:
    import torch

    from disttrain.inference.classifier import Classifier

_BATCH = 256
_GRID = 24
_SAMPLES = 40
_MAPS = 16  # per layer
_FILTERS = 64
_LAYERS = 12
_NONE = "none"  # the labels of an image without any


class LabelledImage(NamedTuple):
    """An image of the data set, with texts below it.

    Attributes:
        picture: the image.
        true: its class; in multi-label data, its classes.
        predicted: what is predicted, or which of its labels is wrong; None without a prediction.
        probability: of the prediction, 0..1, or None.
        right: whether the prediction is correct.
    """

    picture: Picture
    true: str
    predicted: str | None = None
    probability: float | None = None
    right: bool = False


class Layer(NamedTuple):
    """Activations of a layer for one image: up to 16 of its `maps` feature maps of width x height."""

    name: str
    kind: str
    picture: Picture
    maps: int
    width: int
    height: int


@dataclass(frozen=True)
class CheckpointView:
    """Predictions, filters and activations of a checkpoint.

    Attributes:
        checkpoint: name of the checkpoint.
        step: optimizer steps up to the checkpoint.
        precision: precision of the forward pass.
        evaluation: its results.
        samples: number of validation samples; `evaluation` has fewer if the time limit was reached.
        mistakes: the most confident mistakes.
        grid: the first validation images.
        filters: picture and number of the filters of the first convolution; None without one.
        image: the input of `layers`, or None.
        layers: in execution order.
    """

    checkpoint: str
    step: int
    precision: str
    evaluation: Evaluation
    samples: int
    mistakes: list[LabelledImage]
    grid: list[LabelledImage]
    filters: tuple[Picture, int] | None
    image: LabelledImage | None
    layers: list[Layer]


def view_checkpoint(run_dir: Path, config: Config, index: Index, *, budget_s: float) -> CheckpointView:
    """Returns the evaluation of the best checkpoint, and its activations for one image.

    Args:
        run_dir: the run folder.
        config: config of the run.
        index: data set of the run.
        budget_s: time limit in seconds for a checkpoint that has no stored evaluation. No batch starts after
            it, so that a large network on a CPU does not hold up the report.

    Raises:
        DisttrainError: the checkpoint or the data set cannot be used.
    """
    import torch

    from disttrain.inference.eval import usable_samples
    from disttrain.training.group import best_device

    device = torch.device(best_device())
    classifier = _load(run_dir, device)
    assert classifier.step is not None
    ids = np.random.default_rng(0).permutation(usable_samples(config, index))
    found = evaluation_of(Path(classifier.source)) or _evaluate(classifier, config, index, ids, budget_s)
    reader = Reader(index, "val")
    pixels, labels = _read(reader, index, np.array([one.id for one in found.mistakes], np.int64))
    mistakes = [
        LabelledImage(picture_of(image), label_text(index, label), _wrong(index, one), one.probability)
        for image, label, one in zip(pixels, labels, found.mistakes, strict=True)
    ]
    pixels, labels = _read(reader, index, ids[:_GRID])
    images = torch.from_numpy(pixels).to(device)
    with torch.inference_mode(), classifier.as_evaluated():
        grid = _predicted(index, pixels, labels, classifier.probabilities(classifier(images)))
        telling = (n for n, image in enumerate(grid) if image.right and image.true != _NONE)
        right = next(telling, 0)
        layers = _layers(classifier.network, lambda: classifier(images[right : right + 1]))
    return CheckpointView(
        checkpoint=Path(classifier.source).name,
        step=classifier.step,
        precision=classifier.evaluated_in,
        evaluation=found,
        samples=len(ids),
        mistakes=mistakes,
        grid=grid,
        filters=_filters(classifier.network),
        image=grid[right],
        layers=layers,
    )


def label_text(index: Index, label: Any) -> str:
    """Returns the class of a sample, or in multi-label data the classes of its row of `Labels`."""
    if not index.multi_label:
        return index.classes[int(label)]
    return ", ".join(index.classes[at] for at in label.nonzero()[0].tolist()) or _NONE


def _wrong(index: Index, mistake: Mistake) -> str:
    """Returns what was wrongly predicted; a missed label is `not NAME`."""
    missed = mistake.predicted < 0
    return f"not {index.classes[mistake.label]}" if missed else index.classes[mistake.predicted]


def _predicted(
    index: Index, pixels: Pixels, labels: Labels, probabilities: torch.Tensor
) -> list[LabelledImage]:
    """Returns images with their predictions.

    Args:
        index: the data set.
        pixels: uint8 [B, H, W, C].
        labels: see `Labels`.
        probabilities: float32 [B, classes].
    """
    if index.multi_label:
        chosen = (probabilities >= 0.5).to("cpu").numpy().astype(np.uint8)
        chances: list[float | None] = [None] * len(pixels)
    else:
        best, places = probabilities.cpu().max(1)
        chosen, chances = places.numpy(), best.tolist()
    return [
        LabelledImage(
            picture_of(image),
            label_text(index, true),
            label_text(index, row),
            chance,
            bool((true == row).all()),
        )
        for image, true, row, chance in zip(pixels, labels, chosen, chances, strict=True)
    ]


def _evaluate(classifier: Classifier, config: Config, index: Index, ids: Ids, budget_s: float) -> Evaluation:
    """Evaluates as many samples as the time allows."""
    from disttrain.data.stages import open_stream
    from disttrain.training.collectives import Group
    from disttrain.training.evaluation import EvalTask, score
    from disttrain.training.metrics import metrics_for
    from disttrain.training.state import Validation

    began, device = time.monotonic(), classifier.device
    workers = min(8, usable_cores())
    pipeline = config.data.pipeline
    data = open_stream(index, "val", device, batch_size=_BATCH, workers=workers, pipeline=pipeline)
    split = Validation(data, ids, index.classes, multi_label=index.multi_label)
    group, autocast = Group(0, 1, device), classifier.as_evaluated
    task = EvalTask(classifier.network, classifier.normalize, split, group, _BATCH, autocast)
    metrics = metrics_for(split, device)
    score(
        task,
        "none",
        metrics.add,
        lambda number: number == 0 or time.monotonic() - began < budget_s,
    )
    sums = metrics.sums()
    total, correct = int(sums.samples), int(sums.correct)
    record = EvalRecord(loss=None, accuracy=correct / total, correct=correct, total=total, step=0, epoch=0)
    cells, labels = metrics.finish(record, sums, group)
    mistakes = sorted(metrics.mistakes(), reverse=True)[:MISTAKES]
    return Evaluation(record, int(sums.top5_correct), index.classes, cells, mistakes, labels)


def sample_grid(index: Index) -> list[LabelledImage]:
    """Returns training images in class order, up to the same number of each class (the first of several).

    Raises:
        DisttrainError: the data set cannot be read.
    """
    count = min(index.splits["train"].samples, 2048)
    ids = np.sort(np.random.default_rng(0).choice(index.splits["train"].samples, count, replace=False))
    reader = Reader(index, "train")
    each = max(1, _SAMPLES // len(index.classes))
    kept: dict[int, list[LabelledImage]] = {}
    for place in range(count):
        try:
            pixels, labels = _read(reader, index, ids[place : place + 1])
        except DisttrainError:
            continue  # show the others if a sample is bad
        label = int(labels[0].argmax() if index.multi_label else labels[0])
        of_class = kept.setdefault(label, [])
        if len(of_class) < each:
            of_class.append(LabelledImage(picture_of(pixels[0]), label_text(index, labels[0])))
        if sum(map(len, kept.values())) >= min(_SAMPLES, each * len(index.classes)):
            break
    return [image for label in sorted(kept) for image in kept[label]]


def _load(run_dir: Path, device: torch.device) -> Classifier:
    """Returns the network of the best checkpoint, or of the latest if none is marked as best.

    Raises:
        DisttrainError: there is none, it is damaged or does not fit the config.
    """
    from disttrain.inference.classifier import load_model

    link = "best" if (run_dir / "checkpoints/best").exists() else "latest"
    try:
        return load_model(run_dir, link, device=device)
    except CheckpointError:
        return load_model(run_dir, link, device=device)  # a live run may have replaced it meanwhile


def _read(reader: Reader, index: Index, ids: Ids) -> tuple[Pixels, Labels]:
    pixels = np.empty((len(ids), index.height, index.width, index.channels), np.uint8)
    labels = index.empty_labels(len(ids))
    if len(ids):
        reader.decode(ids, pixels, labels)
    return pixels, labels


def _filters(model: Any) -> tuple[Picture, int] | None:
    """Returns the filters of the first convolution, in colour for RGB input, and their number."""
    from torch import nn

    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return None
    weights = first.weight.detach().float().cpu().numpy()[:_FILTERS].astype(np.float64)
    tiles = weights.transpose(0, 2, 3, 1) if weights.shape[1] == 3 else weights[:, 0]
    return mosaic(stretched(tiles)), len(first.weight)


def _layers(model: Any, forward: Callable[[], object]) -> list[Layer]:
    """Returns the feature maps of the layers; only those of convolutions if there are many layers."""
    from torch import Tensor, nn

    seen: list[tuple[str, Any, npt.NDArray[np.float64]]] = []

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def keep(module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
                seen.append((name, module, output[0].detach().float().cpu().numpy().astype(np.float64)))

        return keep

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) > _LAYERS:
        seen = [entry for entry in seen if isinstance(entry[1], nn.Conv2d)] or seen
    if len(seen) > _LAYERS:
        seen = [seen[i] for i in np.linspace(0, len(seen) - 1, _LAYERS).round().astype(int)]
    return [_layer(name, module, maps) for name, module, maps in seen]


def _layer(name: str, module: Any, maps: npt.NDArray[np.float64]) -> Layer:
    count, height, width = maps.shape
    step = max(1, max(height, width) // MOST_SIDE)
    picture = mosaic(stretched(maps[:_MAPS, ::step, ::step]))
    return Layer(name, type(module).__name__, picture, count, width, height)
