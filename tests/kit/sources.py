"""Files that data sets are packed from."""

import numpy as np
from PIL import Image

from disttrain.shards.images import decode_image
from kit.shards import read_split


def read(index, split):
    """Returns images as uint8 [N, H, W, C] and labels."""
    pairs = [(decode_image(image, index.channels), label) for _, image, label in read_split(index, split)]
    return np.stack([image for image, _ in pairs]), [label for _, label in pairs]


def noise(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
