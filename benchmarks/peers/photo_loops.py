"""Peers: ways to load photos of any size for training, one thread or process unless told otherwise.

    python benchmarks/peers/photo_loops.py KIND ROOT [--threads 1] [--samples 1024]

KIND: ours (the loader and the augmentation of a run), webdataset (the pipeline of most people), dataloader
(ImageFolder and a DataLoader with one worker per thread), decoder (simplejpeg in a loop: no crop, nothing
else), litdata, streaming (mosaicml-streaming), dali (on the CPU), spdl (FFmpeg). ROOT is what
benchmarks/photos.py made. The work of all but the decoder: read, decode, random-resized crop to 224, flip,
normalise, batches of 64. The clock starts at the second batch, so that workers and threads have started.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from common import report

BATCH_SIZE = 64
SIDE, LEAST_AREA = 224, 0.08
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def transform():
    """Returns torchvision's reference transform for training, from a PIL image to float32 [3, 224, 224]."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, (LEAST_AREA, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def webdataset(root: Path, threads: int) -> Iterator[int]:
    import webdataset as wds

    urls = [str(path) for path in sorted((root / "photos").glob("train-*.tar"))]
    dataset = (
        wds.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform())
        .batched(BATCH_SIZE)
    )
    workers = threads if threads > 1 else 0
    for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(images)


def dataloader(root: Path, threads: int) -> Iterator[int]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(root / "jpg"), transform())
    workers = threads if threads > 1 else 0
    for images, _ in DataLoader(data, BATCH_SIZE, shuffle=True, num_workers=workers):
        yield len(images)


def jpegs(root: Path) -> list[tuple[str, int]]:
    """Returns the path and the class of each photo."""
    folders = sorted((root / "jpg").iterdir())
    return [(str(path), place) for place, folder in enumerate(folders) for path in sorted(folder.iterdir())]


def encoded(source: tuple[str, int]) -> dict:
    """Returns a sample of litdata's; it keeps the bytes of the file."""
    from PIL import Image

    path, label = source
    return {"image": Image.open(path), "label": label}


def transformed(change: Callable, sample: dict) -> tuple:
    """Returns a sample whose image, which litdata has decoded with torchvision, is transformed."""
    return change(sample["image"]), sample["label"]


def litdata(root: Path, threads: int) -> Iterator[int]:
    import litdata
    from torchvision.transforms import v2

    folder = root / "litdata"
    if not folder.exists():
        litdata.optimize(encoded, jpegs(root), str(folder), chunk_bytes="20MB", num_workers=1, verbose=False)
    change = v2.Compose([step for step in transform().transforms if not isinstance(step, v2.PILToTensor)])
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=partial(transformed, change))
    workers = threads if threads > 1 else 0
    for images, _ in litdata.StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=workers):
        yield len(images)


def streaming(root: Path, threads: int) -> Iterator[int]:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    folder = root / "mds"
    if not folder.exists():
        columns = {"image": "jpeg", "label": "int"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=20 << 20) as out:
            for path, label in jpegs(root):  # the bytes of a jpeg column are stored as they are
                out.write({"image": Path(path).read_bytes(), "label": label})
    change = transform()

    class Photos(StreamingDataset):
        def __getitem__(self, index: int):
            sample = super().__getitem__(index)
            return change(sample["image"]), sample["label"]

    clean_stale_shared_memory()  # of a run that was killed
    dataset = Photos(local=str(folder), shuffle=True, batch_size=BATCH_SIZE, predownload=1 << 20)
    workers = threads if threads > 1 else 0
    for images, _ in DataLoader(dataset, BATCH_SIZE, num_workers=workers):
        yield len(images)


def dali(root: Path, threads: int) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=threads, device_id=None, seed=0)
    def photos():
        files, labels = fn.readers.file(file_root=str(root / "jpg"), random_shuffle=True)
        crops = fn.decoders.image_random_crop(
            files, device="cpu", output_type=types.RGB, random_area=[LEAST_AREA, 1.0]
        )
        resized = fn.resize(crops, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True)
        normalized = fn.crop_mirror_normalize(
            resized,
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            mirror=fn.random.coin_flip(),
        )
        return normalized, labels

    pipeline = photos()
    pipeline.build()
    while True:
        images, _ = pipeline.run()
        yield len(torch.from_dlpack(images.as_tensor()))


def spdl(root: Path, threads: int) -> Iterator[int]:
    import spdl.io
    from spdl.pipeline import PipelineBuilder
    from torchvision.transforms import v2

    paths = [path for path, _ in jpegs(root)]
    random.Random(0).shuffle(paths)
    scale = torch.tensor(STD) * 255
    offset = -torch.tensor(MEAN) / torch.tensor(STD)
    ratios = [3 / 4, 4 / 3]

    def decoded(path: str):
        packets = spdl.io.demux_image(path)
        size = torch.empty(1, packets.height, packets.width)
        top, left, height, width = v2.RandomResizedCrop.get_params(size, [LEAST_AREA, 1.0], ratios)
        flip = "hflip," if random.random() < 0.5 else ""
        filters = f"crop={width}:{height}:{left}:{top}:exact=1,scale={SIDE}:{SIDE}:flags=bilinear,"
        return spdl.io.decode_packets(packets, filter_desc=f"{filters}{flip}format=rgb24")

    def batch(frames: list) -> torch.Tensor:
        pixels = spdl.io.to_torch(spdl.io.convert_frames(frames))  # uint8 [B, H, W, C]
        return torch.addcdiv(offset, pixels.float(), scale)

    builder = PipelineBuilder().add_source(paths).pipe(decoded, concurrency=threads)
    pipeline = builder.aggregate(BATCH_SIZE).pipe(batch).add_sink(2).build(num_threads=threads)
    with pipeline.auto_stop():
        for images in pipeline:
            yield len(images)


def ours(root: Path, threads: int) -> Iterator[int]:
    from disttrain.config import AugmentConfig
    from disttrain.data.epoch_plan import Plan
    from disttrain.data.streamed import Streamed
    from disttrain.host_memory import keep_freed_memory
    from disttrain.shards.crops import RandomCrops
    from disttrain.shards.index import load_index
    from disttrain.training.augment import Augment
    from disttrain.training.normalize import Normalize

    index = load_index("photos", str(root)).cropped(SIDE, 0.875)
    plan = Plan(0, tuple(shard.samples for shard in index.splits["train"].shards), BATCH_SIZE)
    windows = [slice(part.start, part.stop) for part in map(plan.batch, range(plan.steps_per_epoch))]
    keep_freed_memory()  # as a run does
    # One thread loads in the thread of the training loop, like a DataLoader without workers.
    workers = threads if threads > 1 else 0
    cpu = torch.device("cpu")
    stream = Streamed(index, "train", cpu, batch_size=BATCH_SIZE, workers=workers, say=print)
    normalize = Normalize(MEAN, STD, SIDE, channels_last=True)
    augment = Augment(AugmentConfig(flip=True), seed=0, normalize=normalize)
    order = plan.order(0)
    augment.start_epoch(0, order, SIDE, SIDE)
    batches = stream.batches(order, windows, RandomCrops(0, 0, LEAST_AREA))
    for batch, window in zip(batches, windows, strict=True):
        yield len(augment.train(batch.images, window))


def decoder(root: Path, threads: int) -> Iterator[int]:
    from concurrent.futures import ThreadPoolExecutor

    import simplejpeg

    files = [path.read_bytes() for path in sorted((root / "jpg").glob("*/*.jpg"))]
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(files), BATCH_SIZE):
            part = files[begin : begin + BATCH_SIZE]
            yield sum(len(pixels) > 0 for pixels in pool.map(simplejpeg.decode_jpeg, part, chunksize=8))


KINDS = {
    loop.__name__: loop for loop in (ours, webdataset, dataloader, decoder, litdata, streaming, dali, spdl)
}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("kind", choices=KINDS)
    options.add_argument("root", type=Path)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--samples", type=int, default=1024, help="stop after so many (default: 1024)")
    arguments = options.parse_args()
    torch.set_num_threads(1)  # as in the workers of a DataLoader: more would wait actively for the decoders
    batches = KINDS[arguments.kind](arguments.root, arguments.threads)
    next(batches)
    began, seen = time.perf_counter(), 0
    for count in batches:
        seen += count
        if seen >= arguments.samples:
            break
    report((), seen, time.perf_counter() - began, kind=arguments.kind)


if __name__ == "__main__":
    main()
