"""The labels that balanced sampling needs, from ranks of nodes with and without a decoded copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from disttrain.config import parse_config
from disttrain.data.epoch_plan import Ids
from disttrain.shards.index import load_index
from disttrain.training import sampling
from disttrain.training.collectives import Group
from kit.shards import read_split

CONFIG = parse_config(
    "name: a\ndata: {name: seven, sampling: balanced}\nmodel: {name: cnn_mnist}\n"
    "train: {epochs: 1, batch_size: 8}\noptim: {lr: 0.1}\n",
    "a.yaml",
)


def test_each_rank_gives_its_part_with_or_without_a_decoded_copy(
    seven_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, none = load_index("seven", str(seven_root)), np.empty(0, np.int64)
    expected: Ids = np.array([label for _, _, label in read_split(index, "train")])
    for decoded in ((None, expected), (expected, None), (None, None)):
        given: list[list[Ids]] = []

        def gather(group: Group, own: list[Ids], given: list[list[Ids]] = given) -> list[list[Ids]]:
            given.append(own)
            return [[expected]]  # that of all ranks is put together below

        monkeypatch.setattr(sampling, "gather", gather)
        for rank, copy in enumerate(decoded):
            group = Group(rank, len(decoded), torch.device("cpu"))
            labels = sampling.train_labels(CONFIG, index, none, copy, group)
            assert labels is not None
            assert labels.tolist() == expected.tolist()
        assert np.concatenate([part for own in given for part in own]).tolist() == expected.tolist()
