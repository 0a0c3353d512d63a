"""Images per second of loading photos of any size: disttrain beside its peers and the bare decoder.

    pip install scikit-image scikit-learn
    python benchmarks/photos.py --data ROOT [--runs 5] [--threads 1] [--samples 1024] [--peers]

ROOT gets 2,400 photos on the first run, with a shorter side of 200 to 560 pixels and a quality of 90 to 95:
random parts of the photos that scikit-image and scikit-learn ship, turned, brightened and with a little
noise. They lie there as files and as shards. Every measurement is its own process (benchmarks/peers/
photo_loops.py); the runs go round robin, and a first round is not counted.

With --peers, litdata, mosaicml-streaming, DALI on the CPU and spdl take part. They are installed into
ROOT/peers on the first run (gigabytes), and the first two write the photos once in their own format. spdl
needs FFmpeg's libraries, Debian's libavcodec, libavformat, libavfilter and libavdevice.
"""

import argparse
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from common import Claim, environment_with, interleaved, machine, parser, peer, print_json_or

PHOTOS = 2400
CLAIMS = (
    Claim("loading photos", "ours", "webdataset", 2.5, wanted="at least"),
    Claim("loading photos", "ours", "dataloader", 2.5, wanted="at least"),
    Claim("loading photos", "ours", "decoder", 0.9, wanted="at least"),
)
PEER_PACKAGES = ("litdata", "mosaicml-streaming", "nvidia-dali-cuda130", "spdl")
PEER_CLAIMS = (
    Claim("loading photos", "ours", "litdata", 1.5, wanted="at least"),
    Claim("loading photos", "ours", "streaming", 1.5, wanted="at least"),
    Claim("loading photos", "ours", "dali", 1, wanted="at least"),
    Claim("loading photos", "ours", "spdl", 1, wanted="at least"),
)


def make_photos(folder: Path) -> None:
    """Writes the photos into one folder per source."""
    import numpy as np
    import skimage
    import sklearn
    from PIL import Image, ImageEnhance

    ours, theirs = (Path(package.__file__).parent for package in (skimage, sklearn))
    names = ("coffee.png", "astronaut.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")
    names += ("motorcycle_right.png", "retina.jpg", "hubble_deep_field.jpg")
    paths = [ours / "data" / name for name in names]
    paths += [theirs / "datasets/images" / name for name in ("china.jpg", "flower.jpg")]
    sources = [Image.open(path).convert("RGB") for path in paths]
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        kind = int(rng.integers(len(sources)))
        width, height = sources[kind].size
        aspect = rng.choice([4 / 3, 3 / 4, 3 / 2, 1, 16 / 9], p=[0.5, 0.2, 0.2, 0.06, 0.04])
        part_width = min(width, height * aspect) * rng.uniform(0.5, 1)
        part_height = part_width / aspect
        left, top = rng.uniform(0, width - part_width), rng.uniform(0, height - part_height)
        longer = int(rng.integers(440, 561))
        size = (longer, int(longer / aspect)) if aspect >= 1 else (int(longer * aspect), longer)
        box = (left, top, left + part_width, top + part_height)
        photo = sources[kind].resize(size, Image.Resampling.LANCZOS, box)
        if rng.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        photo = ImageEnhance.Brightness(photo).enhance(rng.uniform(0.8, 1.2))
        photo = ImageEnhance.Contrast(photo).enhance(rng.uniform(0.8, 1.2))
        noisy = np.asarray(photo) + rng.normal(0, 2, (size[1], size[0], 1))
        path = folder / f"source{kind}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        quality = int(rng.integers(90, 96))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=quality, subsampling=2)


def rate(kind: str, options: argparse.Namespace, python: Path) -> float:
    """Returns images per second."""
    more = ("--threads", options.threads, "--samples", options.samples)
    line = peer("photo_loops.py", kind, options.data, *more, start=(python,))
    return line["samples"] / line["seconds"]


def print_tables(rates: dict[str, list[float]], claims: list[dict]) -> None:
    for name, values in rates.items():
        median, low, high = (f"{f(values):,.0f}" for f in (statistics.median, min, max))
        print(f"{name:<12} {median:>7} images/s ({low} to {high})")
    for c in claims:
        wanted = f"{c['bound']:g}{'' if c['holds'] else ', not reached'}"
        print(f"ours / {c['peer']:<12} {c['value']:.2f}  wanted at least {wanted}")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--samples", type=int, default=1024, help="of each run (default: 1024)")
    arguments.add_argument("--peers", action="store_true", help="install and measure more loaders")
    options = arguments.parse_args()
    if not (options.data / "jpg").exists():
        make_photos(options.data / "jpg")
    if not (options.data / "photos").exists():
        pack = ("data", "pack", options.data / "jpg", "--name", "photos", "--root", options.data)
        more = ("--val-fraction", "0.1", "--shard-mib", "20")
        command = [sys.executable, "-m", "disttrain", *map(str, (*pack, *more))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    own = other = Path(sys.executable)
    if options.peers:
        other = environment_with(options.data / "peers", *PEER_PACKAGES)
    wanted = CLAIMS + (PEER_CLAIMS if options.peers else ())
    pythons = {"ours": own} | {c.peer: own if c in CLAIMS else other for c in wanted}
    loops = {kind: partial(rate, kind, options, python) for kind, python in pythons.items()}
    rates = interleaved(loops, options.runs)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    claims = [c.result(medians) for c in wanted]
    facts = machine() | {"threads": options.threads, "samples": options.samples, "cores": os.cpu_count()}
    print_json_or(partial(print_tables, rates, claims), options, facts | {"n": options.runs}, claims=claims)


if __name__ == "__main__":
    main()
