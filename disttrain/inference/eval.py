"""`disttrain eval`: evaluates a trained model on a whole split, with any number of processes.

Starts the processes (`disttrain.inference.eval_worker`) and formats their result. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from disttrain.config import AugmentConfig, Config
from disttrain.errors import DataError
from disttrain.inference.run import Facts, open_run
from disttrain.launch.jobs import plan_job, run_job
from disttrain.preflight import open_index
from disttrain.shards.index import Index, load_index
from disttrain.terminal import fitted, printable, width_of
from disttrain.units import accuracy_text, percent

if TYPE_CHECKING:
    from disttrain.data.epoch_plan import Ids

_IN_MATRIX = 20  # most classes in a confusion matrix on a terminal
_IN_TABLE = 40  # most classes in a table
_SHOWN = 10  # of the best classes, the worst and the most confused, if there are more
_LEAST = 12  # columns for the name of a class, however narrow the terminal


def evaluate(
    run: str | Path,
    checkpoint: str | Path = "best",
    *,
    data: str | None = None,
    root: str | None = None,
    tta: Literal["none", "flip", "multi_view"] = "none",
    gpus: int | None = None,
    procs: int | None = None,
) -> dict[str, Any]:
    """Evaluates the model of a run on the validation split of a data set, in new processes.

    Args:
        run: the run folder.
        checkpoint: best, latest, or the path of a checkpoint.
        data: name of a packed data set with the same classes; None means the data set of the run.
        root: folder of the data sets; None means that of the config.
        tta: the test-time augmentation.
        gpus: how many to use; None means all visible ones.
        procs: processes on the CPU, instead of GPUs.

    Returns:
        A dict of loss, accuracy 0..1, correct, total and skipped; macro_precision, macro_recall, macro_f1 and
        calibration_error, 0..1; top5_accuracy and top5_correct (None for up to 5 classes); per_class, a list
        of class, correct, total, accuracy (the recall), precision and f1; confusion, the counts of
        predicted classes for each true class; classes; and what was evaluated, and how. With test-time
        augmentation, plain_accuracy and plain_correct are the results without it. With multi-label data, map
        and micro_f1 are there too, each class has an average_precision, and confusion is None.

    Raises:
        UsageError: the run does not exist, or the machine has fewer GPUs.
        CheckpointError: the checkpoint does not exist or is damaged.
        DataError: the data set is missing or damaged, or has other classes or image sizes.
    """
    trained = open_run(Path(run), checkpoint)
    plan = plan_job(gpus=gpus, procs=procs)
    open_data(trained.config, trained.facts, data, root)
    request = {
        "run": str(run),
        "checkpoint": str(trained.checkpoint),
        "data": data,
        "root": root,
        "tta": tta,
    }
    return run_job(plan, "disttrain.inference.eval_worker", request)


def open_data(config: Config, facts: Facts, data: str | None, root: str | None) -> Index:
    """Returns the index of the data set to evaluate on: `data` in `root`, by default those of the config.

    Raises:
        DataError: the data set is missing or damaged, or has other classes or image sizes.
    """
    # The right size is checked below, with a remedy for an evaluation.
    size = config.data.image_size or facts.width
    place = {"name": data or config.data.name, "root": root or config.data.root, "image_size": size}
    changes = {
        "data": config.data.model_copy(update=place),
        # These disable checks that matter only for training.
        "augment": AugmentConfig(),
        "model": config.model.model_copy(update={"num_classes": None}),
        "train": config.train.model_copy(update={"class_weights": None}),
    }
    other = None if data is None else load_index(data, root or config.data.root, strict=False)
    if other is not None and other.multi_label != facts.multi_label:
        kinds = {False: "one label a sample", True: "any number of labels a sample"}
        found, wanted = kinds[other.multi_label], kinds[facts.multi_label]
        raise DataError(f"{data}: has {found}, but the run was trained on {wanted}; give another --data")
    index = open_index(config.model_copy(update=changes), lambda text: None)
    index = index.cropped(config.data.image_size, config.eval.crop_pct)
    if set(index.classes) != set(facts.classes):
        others = ((index.name, index.classes, facts.classes), ("the run", facts.classes, index.classes))
        only = [
            f"only {name} has {_few(sorted(set(own) - set(other)))}"
            for name, own, other in others
            if set(own) - set(other)
        ]
        raise DataError(f"{index.name}: its classes differ from those of the run: {'; '.join(only)}")
    several = index.image_size is None and index.stored_height is None
    if several or (index.height, index.width, index.channels) != facts.shape:
        found = index.sizes_text() if several else f"{index.channels}x{index.height}x{index.width}"
        raise DataError(
            f"{index.name}: its images are {found}, but the run was trained on "
            f"{facts.channels}x{facts.height}x{facts.width}; "
            f"pack it again{f' with --size {facts.height}' if facts.height == facts.width else ''}"
        )
    return index


def usable_samples(config: Config, index: Index) -> Ids:
    """Returns the ids of the usable validation samples: int64, without those to skip."""
    import numpy as np

    from disttrain.data.epoch_plan import usable_ids
    from disttrain.shards.verify import find_bad_samples

    skipped = np.empty(0, np.int64)
    if config.data.on_error == "skip":
        skipped = find_bad_samples(index, "val", lambda text: None)
    return usable_ids(index.splits["val"].samples, skipped)


def report(result: dict[str, Any], columns: int | None = None) -> Iterator[str]:
    """Yields the lines of a result, for a terminal of this width; None cuts no name."""
    many = f"{result['processes']} process{'es' * (result['processes'] > 1)}"
    yield f"{result['checkpoint']} on {result['data']}/{result['split']}, {many}, {result['precision']}"
    if result.get("map") is not None:
        yield f"mAP      {percent(result['map'])}, micro F1 {percent(result.get('micro_f1'))}"
    yield f"accuracy {_share(result['correct'], result['total'])}, loss {result['loss']:.4f}"
    if result["top5_correct"] is not None:
        yield f"top 5    {_share(result['top5_correct'], result['total'])}"
    yield _macro(result)
    if "plain_correct" in result:
        yield f"without {result['tta']} {_share(result['plain_correct'], result['total'])}"
    if result["skipped"]:
        yield f"skipped  {result['skipped']:,} unusable samples"
    yield ""
    yield from _class_table(result["per_class"], columns)
    classes, confusion = result["classes"], result["confusion"]
    if confusion is None:
        return
    yield ""
    if len(classes) > _IN_MATRIX:
        yield from _most_confused(result, columns)
        return
    cell = max(len(f"{count:,}") for row in confusion for count in row) + 1
    yield "confusion matrix: a row for each true class, a column for each predicted class"
    names = _column(classes, columns, cell * len(classes) + 1)
    for name, row in zip(names, confusion, strict=True):
        yield f"{name} " + "".join(f"{count:>{cell},}" for count in row)


def _class_table(rows: list[dict[str, Any]], columns: int | None) -> Iterator[str]:
    """Yields a line for each class, or for the worst and the best ones if there are many."""
    figures = {"accuracy": "accuracy", "precision": "precision", "f1": "F1"}
    if any("average_precision" in row for row in rows):
        figures = {"average_precision": "AP", "accuracy": "recall", "precision": "precision", "f1": "F1"}
    first = next(iter(figures))
    parts = [rows]
    if len(rows) > _IN_TABLE:
        known = [row for row in rows if row[first] is not None]
        parts = [
            sorted(known, key=lambda row: (sign * row[first], -row["total"]))[:_SHOWN] for sign in (1, -1)
        ]
        rest = f", {len(rows) - len(known):,} without samples" if len(known) < len(rows) else ""
        yield f"the {_SHOWN} worst and best of {len(rows):,} classes{rest} (--json has all)"
    shown = [row for part in parts for row in part]
    width = 11 * len(figures) + 20
    head, *names = _column(["class", *(row["class"] for row in shown)], columns, width)
    titles = "".join(f" {title:>10}" for title in figures.values())
    yield f"{head}{titles} {'correct':>9} {'of':>9}"
    for number, (name, row) in enumerate(zip(names, shown, strict=True)):
        if number == len(parts[0]):
            yield ""
        shares = "".join(f" {percent(row[key]):>10}" for key in figures)
        yield f"{name}{shares} {row['correct']:>9,} {row['total']:>9,}"


def _column(names: Sequence[str], columns: int | None, others: int) -> list[str]:
    """Returns names of the same width, cut if the terminal has not enough columns for them and the others."""
    width = max(map(width_of, names))
    if columns is not None:
        width = min(width, max(_LEAST, columns - others))
    return [fitted(name, width) for name in names]


def _most_confused(result: dict[str, Any], columns: int | None) -> Iterator[str]:
    import numpy as np

    from disttrain.runs.evaluation import most_confused

    yield "most frequent confusions: images, share of the class (--json has the matrix)"
    for true, predicted, count, share in most_confused(np.array(result["confusion"]), _SHOWN):
        names = [result["classes"][true], result["classes"][predicted]]
        figures = f"{count:>7,} {percent(share, 1):>8}  "
        if columns is not None:
            room = max(_LEAST, (columns - len(figures) - len(" as ")) // 2)
            names = [fitted(label, room).rstrip() for label in names]
        yield figures + " as ".join(map(printable, names))


def _macro(result: dict[str, Any]) -> str:
    means = [f"{name} {percent(result.get(f'macro_{name}'))}" for name in ("precision", "recall")]
    text = f"macro F1 {percent(result.get('macro_f1'))}, {', '.join(means)}"
    if result["confusion"] is None:
        return text
    return f"{text}; calibration error {percent(result.get('calibration_error'))}"


def _share(part: int, whole: int) -> str:
    return accuracy_text(part / whole, part, whole)


def _few(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
