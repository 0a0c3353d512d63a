"""The weights of the classes in the training loss."""

from types import SimpleNamespace

import pytest

from disttrain.config import TrainConfig
from disttrain.errors import UsageError
from disttrain.preflight import UNIFORM_REMEDY, expect_every_class, relative_class_weights

INDEX = SimpleNamespace(
    name="few",
    classes=("ant", "bee", "cat"),
    splits={"train": SimpleNamespace(class_counts=(10, 30, 80), samples=120)},
    multi_label=False,
)


def train_config(weights):
    return TrainConfig(epochs=1, batch_size=8, class_weights=weights)


def test_balanced_weights_are_samples_by_classes_times_count():
    expected = [120 / 30, 120 / 90, 120 / 240]
    assert relative_class_weights(train_config("balanced"), INDEX) == pytest.approx(expected)


def test_the_mean_weight_of_the_training_samples_is_1():
    expected = [120 / 330, 0, 480 / 330]
    assert relative_class_weights(train_config([1.0, 0.0, 4.0]), INDEX) == pytest.approx(expected)
    assert relative_class_weights(train_config(None), INDEX) is None


@pytest.mark.parametrize(
    ("weights", "counts", "message"),
    [
        (
            "balanced",
            (10, 0, 80),
            "train.class_weights = balanced: class bee has no sample in the train split of few; give a list "
            "with a weight for each of the 3 classes",
        ),
        (
            [1.0, 2.0],
            (10, 30, 80),
            "train.class_weights has 2 numbers, but few has 3 classes; give one for each, in the order of "
            "`disttrain data inspect few`",
        ),
        (
            [0.0, 1.0, 0.0],
            (10, 0, 80),
            "train.class_weights: no training sample has a weight above 0; raise that of a class with "
            "samples",
        ),
    ],
)
def test_weights_that_do_not_suit_the_data_set(weights, counts, message):
    split = SimpleNamespace(class_counts=counts, samples=120)
    index = SimpleNamespace(name="few", classes=INDEX.classes, splits={"train": split}, multi_label=False)
    with pytest.raises(UsageError) as caught:
        relative_class_weights(train_config(weights), index)
    assert str(caught.value) == message


def test_balanced_sampling_needs_a_sample_of_every_class():
    message = "data.sampling = balanced: class bee has no sample in the train split of few; use "
    with pytest.raises(UsageError, match=message):
        expect_every_class(INDEX, (10, 0, 80), "data.sampling = balanced", UNIFORM_REMEDY)
    expect_every_class(INDEX, (10, 1, 80), "data.sampling = balanced", UNIFORM_REMEDY)
