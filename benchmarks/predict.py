"""How fast `disttrain predict` goes over 10,000 files, beside the decoder alone and the usual script.

    python benchmarks/predict.py --data ROOT [--runs 5] [--threads 2] [--side 256]

The files are the validation split of CIFAR-10 as JPEG, one file each, the network is lenet_bn. With --side
they are enlarged to so many pixels before, as photos are that are larger than what the network reads.

decoder   threads that read and decode the files, and nothing else
in turn   first the decoder over all files, then the network over all images
predict   `disttrain.inference.prediction.predictions` over the same files, network and top 5 included
command   `disttrain predict RUN FOLDER --json`, the whole process, less one over a single file
usual     torchvision's ImageFolder, ToTensor, Normalize and a DataLoader with two workers, the same network

Everything goes round robin in this process, but for the command and the workers; the files are in the page
cache. The medians of images per second and their ratios are printed.
"""

import io
import subprocess
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

from common import Claim, config, disttrain, interleaved, parser, report, variables

CLAIMS = (
    Claim("predict / decoder, then network", "predict", "in turn", 1, "at least"),
    Claim("predict / decoder alone (the network on a GPU)", "predict", "decoder", 0.8, "at least"),
    Claim("predict / usual script", "predict", "usual", 2, "at least"),
    Claim("command / predict", "command", "predict", 0.9, "at least"),
)


def write_files(data: Path, folder: Path, side: int | None) -> list[str]:
    """Writes the validation split of CIFAR-10 as <class>/<key>.jpg."""
    import numpy as np
    from PIL import Image

    from disttrain.shards.index import load_index
    from disttrain.shards.reader import Reader

    index = load_index("cifar10", str(data))
    files = []
    for sample in Reader(index, "val").samples(np.arange(index.splits["val"].samples)):
        image, name = sample["jpg"], sample["__key__"].replace("/", "_")
        path = folder / index.classes[int(sample["cls"])] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if side is None:
            path.write_bytes(image)
        else:
            large = Image.open(io.BytesIO(image)).resize((side, side), Image.Resampling.BICUBIC)
            large.save(path, quality=90)
        files.append(str(path))
    return sorted(files)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, help="number of torch threads (default: torch's own)")
    arguments.add_argument(
        "--side", type=int, help="side of the image files in pixels (default: 32, as packed)"
    )
    options = arguments.parse_args()
    import numpy as np
    import torch

    from disttrain.inference.classifier import load_model
    from disttrain.inference.prediction import decoded, predictions

    if options.threads:
        torch.set_num_threads(options.threads)
    env = variables(options.data, options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        files = write_files(options.data, Path(scratch) / "files", options.side)
        run = Path(scratch) / "run"
        settings = ("train.epochs=1", "train.batch_size=5000", "train.precision=fp32")
        train = disttrain("run", "-q", "--procs", 1, config("lenet_bn_cifar"), *settings, "--run-dir", run)
        subprocess.run(train, env=env, check=True, stdout=subprocess.DEVNULL)
        model = load_model(run, device="cuda" if torch.cuda.is_available() else "cpu")

        def rate(work) -> float:
            began = time.perf_counter()
            count = sum(1 for _ in work())
            assert count == len(files), f"{count} of {len(files)}"
            return count / (time.perf_counter() - began)

        def decode():
            return (image for batch in decoded(files, model.facts) for image in batch)

        def in_turn():
            batches = [[image for _, image, _ in batch] for batch in decoded(files, model.facts)]
            with torch.inference_mode():
                for batch in batches:
                    yield from (
                        model(torch.from_numpy(np.stack(batch)).to(model.device)).softmax(1).topk(5).values
                    )

        def command_s(*names: str) -> float:
            began = time.perf_counter()
            subprocess.run(
                disttrain("predict", run, *names, "--json"), env=env, check=True, stdout=subprocess.DEVNULL
            )
            return time.perf_counter() - began

        def command() -> float:
            return len(files) / (command_s(str(Path(scratch) / "files")) - command_s(files[0]))

        def usual():
            from torchvision import datasets, transforms

            to_size = transforms.Resize(model.facts.shape[:2])
            steps = [to_size, transforms.ToTensor(), transforms.Normalize(model.facts.mean, model.facts.std)]
            data = datasets.ImageFolder(str(Path(scratch) / "files"), transforms.Compose(steps))
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for images, _ in torch.utils.data.DataLoader(data, batch_size=64, num_workers=2):
                    yield from model.network(images.to(model.device)).softmax(1).topk(5).values

        measured = {
            "decoder": partial(rate, decode),
            "in turn": partial(rate, in_turn),
            "predict": partial(rate, partial(predictions, model, files, 5)),
            "command": command,
            "usual": partial(rate, usual),
        }
        values = interleaved(measured, options.runs)
    report(options, values, CLAIMS, unit="images/s", digits=0)


if __name__ == "__main__":
    main()
