"""Stages of the user's own between the shards and the batches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

import disttrain as library
from disttrain.config import load_config
from disttrain.data.batches import Batch, choose_cache
from disttrain.data.stages import Pipeline, Stages, open_stream
from disttrain.errors import DataError, UsageError
from disttrain.shards.index import Index, load_index
from kit import REPOSITORY
from kit.commands import Run

CPU = torch.device("cpu")
WINDOWS = [slice(0, 50), np.r_[60:90, 61:91], slice(100, 101), slice(300, 365)]


@pytest.fixture
def seven(seven_root: Path) -> Index:
    return load_index("seven", str(seven_root))


def served(index: Index, pipeline: Pipeline | None, workers: int = 2, split: str = "train") -> list[Batch]:
    order = np.random.default_rng(0).permutation(index.splits[split].samples)
    loader = open_stream(index, split, CPU, batch_size=50, workers=workers, pipeline=pipeline)
    return list(loader.batches(order, WINDOWS if split == "train" else [slice(0, 60), slice(60, 95)]))


def changed(function: Callable[[dict[str, Any]], dict[str, Any]]) -> Pipeline:
    return lambda stages: [stages.source, stages.decode, stages.threaded(function), stages.batch]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_usual_stages_give_the_batches_of_no_pipeline(seven: Index, workers: int) -> None:
    for split in ("train", "val"):
        plain = served(seven, None, workers, split)
        staged = served(seven, lambda stages: stages[:3], workers, split)
        for ours, theirs in zip(staged, plain, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
            assert ours.ids.tolist() == theirs.ids.tolist()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves the tars open
def test_the_source_yields_ordinary_webdataset_samples(seven: Index) -> None:
    seen: dict[str, dict[str, Any]] = {}

    def look(sample: dict[str, Any]) -> dict[str, Any]:
        seen[sample["__key__"]] = dict(sample)
        return sample

    order = np.arange(seven.splits["train"].samples)
    loader = open_stream(
        seven, "train", CPU, batch_size=64, workers=0,
        pipeline=lambda stages: [stages.source, webdataset.map(look), stages.decode, stages.batch],
    )  # fmt: skip
    ids = [id_ for batch in loader.batches(order, [slice(0, 720)]) for id_ in batch.ids]
    assert ids == [sample.pop("__id__") for sample in seen.values()]
    assert [sample.pop("__position__") for sample in seen.values()] == list(range(720))
    tars = [str(seven.folder / shard.file) for shard in seven.splits["train"].shards]
    stock = webdataset.WebDataset(tars, shardshuffle=False)
    for ours, theirs in zip(seen.values(), stock, strict=True):
        assert theirs.pop("cls").strip() == ours.pop("cls")
        assert ours == {key: theirs[key] for key in ours}
        assert ours.keys() == {"__key__", "__url__"} | theirs.keys() & {"png", "jpg", "webp"}


def test_a_stage_changes_images_and_labels(seven: Index) -> None:
    plain = served(seven, None)
    other = served(seven, changed(lambda s: s | {"image": 255 - s["image"], "cls": (s["cls"] + 1) % 4}))
    for ours, theirs in zip(other, plain, strict=True):
        assert torch.equal(ours.images, 255 - theirs.images)
        assert torch.equal(ours.labels, (theirs.labels + 1) % 4)


def without_the_third(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (sample for number, sample in enumerate(samples) if number != 3)


def with_the_first_twice(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, sample in enumerate(samples):
        yield sample
        if number == 0:
            yield sample


def then_more(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        yield sample
    yield sample


def fails(sample: dict[str, Any]) -> dict[str, Any]:
    return {} | sample["depth"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (lambda s: [s.source, without_the_third, s.decode, s.batch], "returns sample .*, but sample"),
        (lambda s: [s.source, s.decode, with_the_first_twice, s.batch], r"returns sample \d+, but sample"),
        (
            lambda s: [s.source, s.decode, then_more, s.batch],
            r"returns sample \d+, but no more samples were expected",
        ),
        (
            lambda s: [s.source, s.threaded(lambda sample: {"__id__": sample["__id__"]}), s.decode, s.batch],
            "the decode stage needs samples with an image file",
        ),
        (changed(lambda s: {"image": s["image"]}), r"sample without __id__, but sample \d+ was expected"),
        (changed(lambda s: s | {"image": s["image"] / 255}), r"needs .* `image`, uint8 \[8, 8, 3\]"),
        (changed(lambda s: s | {"image": s["image"][:4]}), r"needs samples with `image`, uint8 \[8, 8, 3\]"),
        (changed(lambda s: s | {"cls": "cat"}), r"`cls`, an int: ValueError"),
        (changed(lambda s: s | {"cls": 4}), r"returns a `cls` outside 0\.\.3"),
        (changed(fails), "KeyError: 'depth'"),
        (lambda s: [s.source, s.decode], r"returns a dict; end it with stages\.batch"),
        (lambda s: None, "TypeError"),
    ],
)  # fmt: skip
def test_a_pipeline_that_breaks_the_promise_is_named(seven: Index, pipeline: Pipeline, message: str) -> None:
    with pytest.raises(UsageError, match=r"^data\.pipeline: .*" + message):
        served(seven, pipeline)


def test_a_bad_sample_is_named_as_without_a_pipeline(seven: Index) -> None:
    def cut(sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {key: sample[key][:40] for key in sample.keys() & {"png", "jpg", "webp"}}

    with pytest.raises(DataError, match=r"train-\d\.tar: sample some/folder/\S+: .*data\.on_error=skip"):
        served(seven, lambda stages: [stages.source, stages.threaded(cut), stages.decode, stages.batch])


def test_nothing_is_cached_with_a_pipeline() -> None:
    reason = "the stages of data.pipeline run"
    assert choose_cache("auto", 1, CPU, streamed=reason)[0] == "none"
    with pytest.raises(UsageError, match=r"data\.cache = host, but the stages of data\.pipeline run"):
        choose_cache("host", 1, CPU, streamed=reason)


def test_open_data_takes_the_function(seven_root: Path) -> None:
    def pipeline(stages: Stages) -> list[Any]:
        return [stages.source, stages.decode, stages.threaded(black), stages.batch]

    def black(sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {"image": np.zeros_like(sample["image"])}

    data = library.open_data("seven", batch_size=100, root=str(seven_root), pipeline=pipeline)
    batches = list(data)
    assert sorted(id_ for batch in batches for id_ in batch.ids) == list(range(720))
    assert not any(batch.images.any() for batch in batches)


@pytest.mark.nightly
def test_the_example_of_the_document_trains_and_evaluates(disttrain: Run, tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_stages.py").write_text(code)
    config = REPOSITORY / "configs" / "quickstart.yaml"
    key = "data.pipeline=my_stages:pipeline"
    one, two = (
        disttrain("run", config, key, "train.epochs=1", "--procs", str(n), "--run-dir", f"run{n}", "-q")
        for n in (1, 2)
    )
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    results = [
        json.loads((tmp_path / f"run{n}" / "metrics.jsonl").read_text().splitlines()[-1]) for n in (1, 2)
    ]
    assert results[0]["total"] == results[1]["total"] == 359
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=0.2)
    evaluated = disttrain("eval", "run1", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["correct"] == results[0]["correct"]
    again = disttrain("run", config, "train.epochs=2", "--procs", "1", "--run-dir", "run1", "-q")
    assert again.returncode == 2
    assert "data.pipeline: my_stages:pipeline -> None" in again.stderr
    missing = disttrain("run", config, "data.pipeline=my_stages:pipelin", "--procs", "1", "--run-dir", "run3")
    assert missing.returncode == 2
    assert "data.pipeline: module my_stages has no pipelin; did you mean pipeline?" in missing.stderr


def test_a_pipeline_is_named_with_a_colon() -> None:
    with pytest.raises(UsageError, match=r"data\.pipeline.*package\.module:function"):
        load_config(REPOSITORY / "configs" / "quickstart.yaml", ["data.pipeline=my_stages.pipeline"])
