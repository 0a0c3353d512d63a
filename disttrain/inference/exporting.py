"""`disttrain export`: writes a trained model for other programs, checks it on real images, adds a model card.

Every format takes images as stored, uint8 [B, H, W, C] with any B, and returns the logits of the classes,
float32 [B, classes]. The normalization is part of the model; for safetensors, it is in the header. torch is
imported only after the arguments have been checked.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from disttrain.errors import DisttrainError, StorageError, UsageError
from disttrain.files import write_atomically
from disttrain.inference import modelcard
from disttrain.inference.eval import open_data, usable_samples
from disttrain.inference.run import FACTS, Facts, Trained, open_run, saying_where_code_lies
from disttrain.shards.index import Index

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from disttrain.inference.classifier import Classifier

    Scores = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]

Format = Literal["safetensors", "torch-export", "onnx"]

SUFFIXES: dict[Format, str] = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-4
"""Largest allowed difference of a logit; relative to the largest logit if that is above 1."""

_IMAGES = 256  # validation images for the check of a file
_ONNX_MODULES = ("onnx", "onnxruntime", "onnxscript")
_FACTS_FILE = "disttrain.json"  # in a torch.export archive


@dataclass(frozen=True)
class Exported:
    """An exported file that passed the check.

    Attributes:
        path: the file; the model card is README.md beside it.
        difference: largest difference between its logits and those of the model.
        images: number of images that they were compared on.
    """

    path: Path
    difference: float
    images: int


def export(
    run: str | Path,
    file_format: Format,
    output: str | Path | None = None,
    *,
    checkpoint: str | Path = "best",
    root: str | None = None,
    opset: int | None = None,
) -> Exported:
    """Exports the model of a run, checks the file, and writes a model card beside it.

    The weights are the moving average if the run has one.

    Args:
        run: the run folder.
        file_format: safetensors, torch-export or onnx.
        output: the file; None means export/<file_format>/model.<suffix> in the run folder.
        checkpoint: best, latest, or the path of a checkpoint.
        root: folder of the data sets; None means that of the config.
        opset: ONNX operator set of an onnx file; None leaves it to torch.

    Raises:
        UsageError: the run does not exist, a package is missing, the folder has another README.md, or the
            network cannot be written with this opset.
        CheckpointError: the checkpoint does not exist or is damaged.
        DataError: the data set of the run, needed for the check, is missing or damaged.
        StorageError: the file cannot be written.
        DisttrainError: the model cannot be exported, or the file gives other logits; no file is left then.
    """
    if file_format == "onnx" and any(importlib.util.find_spec(name) is None for name in _ONNX_MODULES):
        raise UsageError(
            f"--format onnx needs {', '.join(_ONNX_MODULES)}; install them with "
            "python -m pip install 'disttrain[onnx]'"
        )
    if opset is not None and file_format != "onnx":
        raise UsageError(
            f"--opset {opset}: --format {file_format} has none; leave it out, or use --format onnx"
        )
    trained = open_run(Path(run), checkpoint)
    name = f"model{SUFFIXES[file_format]}"
    path = trained.folder.path / "export" / file_format / name if output is None else Path(output)
    if path.suffix != SUFFIXES[file_format]:
        raise UsageError(f"--output {path}: expected a name that ends in {SUFFIXES[file_format]}")
    modelcard.check_place(path.parent)
    index = open_data(trained.config, trained.facts, None, root)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        exported = _export(trained, file_format, opset, index, path, partial)
        text = modelcard.card(trained, file_format, path.name, index, exported.difference, exported.images)
        write_atomically(path.parent / modelcard.NAME, text)
        return exported
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; choose another --output"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _export(
    trained: Trained, file_format: Format, opset: int | None, index: Index, path: Path, partial: Path
) -> Exported:
    import torch

    from disttrain.inference.classifier import load_model

    classifier = load_model(trained.folder.path, trained.checkpoint)
    classifier.input.channels_last = False
    classifier.network.to(memory_format=torch.contiguous_format)
    images = real_images(trained, index)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own code
            reader = _WRITERS[file_format](classifier, partial, opset)
    except (OSError, UsageError):
        raise
    except Exception as error:  # exporters raise errors of many types
        reason = " ".join(str(error).split())[:300]
        raise DisttrainError(
            f"{trained.facts.model} cannot be exported as {file_format}: {type(error).__name__}: {reason}; "
            "use --format safetensors, which holds any network"
        ) from error
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(images)).numpy()
    difference = 0.0
    for part in (slice(0, 1), slice(1, None)):  # checks two batch sizes
        if len(images[part]):
            difference = max(difference, float(abs(reader(images[part]) - expected[part]).max()))
    limit = TOLERANCE * max(1.0, float(abs(expected).max()))
    if not difference <= limit:
        raise DisttrainError(
            f"{path}: not written: its logits differ by {difference:.3g} from the model's on {len(images)} "
            f"images, more than {limit:.3g}; please report it"
        )
    partial.replace(path)
    return Exported(path, difference, len(images))


def real_images(trained: Trained, index: Index) -> npt.NDArray[np.uint8]:
    """Returns images from all over the validation split: uint8 [B, H, W, C]."""
    import numpy as np
    import torch

    from disttrain.data.stages import open_stream

    usable = usable_samples(trained.config, index)
    ids = usable[np.unique(np.linspace(0, len(usable) - 1, _IMAGES).astype(np.int64))]
    with saying_where_code_lies(trained.folder):
        loader = open_stream(
            index,
            "val",
            torch.device("cpu"),
            batch_size=len(ids),
            workers=0,
            pipeline=trained.config.data.pipeline,
        )
    return next(loader.batches(ids, [slice(None)])).images.numpy()


def _write_safetensors(classifier: Classifier, path: Path, _: int | None) -> Scores:
    from safetensors.torch import save

    from disttrain.inference.classifier import METADATA, load_model

    weights, others = _tied_once(classifier.network.state_dict())
    path.write_bytes(save(weights, others | {"format": "pt", METADATA: _json(classifier.facts)}))
    return _in_torch(load_model(path))


def _tied_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tied weights under their first name only, and the other names with that name.

    The format allows no two tensors in the same memory. `read_safetensors` gives all names again.
    """
    import torch

    weights: dict[str, Tensor] = {}
    names: dict[Any, str] = {}
    others: dict[str, str] = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        first = names.setdefault(place, name) if value.numel() else name
        if first != name:
            others[name] = first
        else:  # cloned, because it may be a part of another one
            weights[name] = value.clone(memory_format=torch.contiguous_format)
    return weights, others


def _write_torch_export(classifier: Classifier, path: Path, _: int | None) -> Scores:
    import torch

    program = _traced(classifier)
    program.example_inputs = None  # otherwise they would be pickled into the file
    torch.export.save(program, path, extra_files={_FACTS_FILE: _json(classifier.facts)})
    module: Any = torch.export.load(path).module()
    return _in_torch(module)


def _write_onnx(classifier: Classifier, path: Path, opset: int | None) -> Scores:
    import onnx
    import onnxruntime
    import torch

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with _quiet():
        program: Any = torch.onnx.export(
            _traced(classifier), **names, dynamo=True, verbose=False, opset_version=opset
        )
    got = program.model.opset_imports[""]
    if opset is not None and got != opset:  # torch then writes the one that it comes nearest with
        raise UsageError(
            f"--opset {opset}: torch {torch.__version__} cannot write {classifier.facts.model} with it; "
            f"use --opset {got}"
        )
    _name_batch_axis(program.model)
    program.model.metadata_props.update(
        {
            "disttrain": _json(classifier.facts),
            "classes": json.dumps(classifier.classes),
            "input": modelcard.input_text(classifier.facts),
            "output": modelcard.output_text(classifier.facts),
        }
    )
    program.save(path, external_data=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what the ONNX exporter logs about an opset that it cannot convert to."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _name_batch_axis(model: Any) -> None:
    """Calls the free axis of an ONNX model `batch`, in place of torch's symbol."""
    symbol = model.graph.inputs[0].shape[0].value
    outputs = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *outputs):
        for axis, length in enumerate(value.shape or ()):
            text = getattr(length, "value", None)  # of a symbol or an expression with it
            if text is not None:
                value.shape[axis] = re.sub(rf"\b{re.escape(symbol)}\b", "batch", text)


_WRITERS: dict[Format, Callable[[Classifier, Path, int | None], Scores]] = {
    "safetensors": _write_safetensors,
    "torch-export": _write_torch_export,
    "onnx": _write_onnx,
}
"""Writes a classifier to a path, for onnx with an operator set, and returns what computes with that file."""


def _traced(classifier: Classifier) -> Any:
    import torch

    example = torch.zeros(2, *classifier.facts.shape, dtype=torch.uint8)
    return torch.export.export(classifier, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def _in_torch(module: Callable[[Tensor], Tensor]) -> Scores:
    import torch

    def scores(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            result: npt.NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return result

    return scores


def _json(facts: Facts) -> str:
    return FACTS.dump_json(facts).decode()
