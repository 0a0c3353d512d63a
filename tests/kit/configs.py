"""A config file to change."""

import pytest

from disttrain.config import load_config
from disttrain.errors import UsageError

BASE = """\
name: tiny
data:
  name: digits
model: {name: cnn_mnist}
train:
  epochs: 2
  batch_size: 64
optim: {name: sgd, lr: 0.1}
"""


def load(file, *overrides, text=None, add=""):
    """Loads BASE, or another text, or BASE with more lines, under overrides."""
    file.write_text((BASE if text is None else text) + add)
    return load_config(file, overrides)


def mistake(file, *overrides, **content):
    """Returns the message for a config with mistakes; the path is shortened to its name."""
    with pytest.raises(UsageError) as caught:
        load(file, *overrides, **content)
    return str(caught.value).replace(f"{file.parent}/", "")
