"""A toy data set, made through `pack`, for the tests of the packed format."""

import hashlib
import io
import json
import tarfile

import numpy as np
from PIL import Image

from disttrain.shards.pack import Options
from disttrain.shards.pack import pack as pack_samples
from disttrain.shards.writer import Sample

CLASSES = ("cat", "dog", "emu")


def encode(pixels, image_format="PNG", **options):
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, image_format, **options)
    return file.getvalue()


def images(count, seed=0, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


class Listed:
    """Samples in memory."""

    def __init__(self, samples):
        self._samples = samples

    def __len__(self):
        return len(self._samples)

    def load(self, number):
        return self._samples[number]

    def size(self, number):
        return len(self._samples[number].image)

    def sample_fingerprint(self, number):
        return None


def samples(pixels):
    return [Sample(encode(image), "png", i % len(CLASSES)) for i, image in enumerate(pixels)]


def pack(name="toy", train=10, val=4, seed=0, root=None, shape=(6, 5, 3), **options):
    splits = {
        "train": Listed(samples(images(train, seed, shape))),
        "val": Listed(samples(images(val, seed + 1, shape))),
    }
    return pack_samples(name, root, splits, CLASSES, 3, Options(**options))


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_index(folder, change):
    path = folder / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_shard(folder, members):
    """Replaces the first train shard by one of these members, with an index that agrees."""
    path = folder / "train-000000.tar"
    path.chmod(0o644)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.uname = info.gname = "disttrain"
            tar.addfile(info, io.BytesIO(data))
    shard = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_index(folder, lambda content: content["splits"]["train"]["shards"][0].update(shard))


PNG = encode(images(1)[0])
