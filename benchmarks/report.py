"""Time and file size of the report of a long run on many GPUs.

    python benchmarks/report.py [--hours 24] [--gpus 64] [--records 100000] [--folder DIR]

Makes the files of such a run (some GB: a reading of every GPU every second, its GPUs in every log point) with
one outlier in each measure, writes its report in a process of its own, and looks for the outliers in it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from disttrain.runs.runfolder import RunFolder

START_S = datetime(2026, 11, 20, tzinfo=UTC).timestamp()


def stamp(seconds: float, places: str = "milliseconds") -> str:
    return datetime.fromtimestamp(START_S + seconds, UTC).isoformat(timespec=places)[:-6] + "Z"


def gpu(number: int, noise: float) -> dict[str, object]:
    """Returns one reading of a GPU; noise is 0..1."""
    return {
        "host": f"node{number // 8:03d}",
        "index": number % 8,
        "uuid": f"GPU-{number:08d}-1111-2222-3333-444455556666",
        "name": "NVIDIA H100 80GB HBM3",
        "utilization_pct": round(80 + 20 * noise),
        "memory_used_mib": round(60000 + 9000 * noise),
        "memory_total_mib": 81559,
        "power_w": round(500 + 180 * noise, 1),
        "temperature_c": round(55 + 12 * noise),
    }


def make_run(path: Path, *, hours: float, gpus: int, records: int) -> None:
    """Writes the folder of a run."""
    folder = RunFolder(path)
    (path / "logs").mkdir(parents=True)
    whole_s = 3600 * hours
    dice = random.Random(0)
    rows = [gpu(number, 0.5) for number in range(gpus)]
    with folder.metrics.open("w") as file:
        for number in range(records):
            done = number / records
            record = {
                "time": stamp(whole_s * done, "microseconds"),
                "kind": "train",
                "step": 20 * (number + 1),
                "epoch": 1 + number * 90 // records,
                "samples": 20480 * (number + 1),
                "loss": 4 * math.exp(-3 * done) + dice.gauss(0, 0.1) if number != records // 3 else 977.25,
                "accuracy": 0.8 * done,
                "lr": 0.5 * (1 - done),
                "images_per_s": 23000 + dice.gauss(0, 500),
                "step_time_s": whole_s / records / 20,
                "data_wait_pct": 3 + dice.random(),
                "skipped": 0,
                "gpus": rows,
            }
            file.write(json.dumps(record) + "\n")
            if (number + 1) % (records // 90) == 0:
                evaluation = {"time": stamp(whole_s * done, "microseconds"), "kind": "eval", "loss": 2.0}
                evaluation |= {"step": 20 * (number + 1), "epoch": 1 + number * 90 // records}
                evaluation |= {"accuracy": 0.7 * done, "correct": int(7000 * done), "total": 10000}
                file.write(json.dumps(evaluation) + "\n")
    texts = [[json.dumps(gpu(number, k / 50))[1:] for k in range(51)] for number in range(gpus)]
    with folder.gpu.open("w") as file:
        for second in range(int(whole_s)):
            head = '{"time": "' + stamp(second) + '", '
            file.writelines(head + texts[number][dice.randrange(51)] + "\n" for number in range(gpus))
            if second == int(whole_s) // 2:
                outlier = gpu(gpus // 2, 0.5) | {"power_w": 1203.5}
                file.write(json.dumps({"time": stamp(second + 0.5)} | outlier) + "\n")
    status = {"state": "finished", "exit_code": 0, "step": 20 * records, "epoch": 90, "restarts": 0}
    status |= {"started_at": stamp(0), "updated_at": stamp(whole_s), "samples_seen": 20480 * records}
    (path / "status.json").write_text(json.dumps(status))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="folder to create the run in, or to reuse")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.folder or Path(scratch) / "run"
        if not path.exists():
            make_run(path, hours=options.hours, gpus=options.gpus, records=options.records)
        size = sum((path / name).stat().st_size for name in ("metrics.jsonl", "gpu.jsonl"))
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "disttrain", "report", str(path)], check=True)
        wall_s = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        page = path / "report.html"
        print(
            f"{options.records:,} records, {options.gpus} GPUs, {options.hours:g} h, {size / 2**30:.2f} GiB: "
            f"{wall_s:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of processor time, "
            f"{used.ru_maxrss / 2**10:,.0f} MiB of memory, page of {page.stat().st_size / 1e6:.2f} MB"
        )
        text = page.read_text()
        print("outliers included:", "977.25" in text, "1,204" in text or "1203.5" in text)


if __name__ == "__main__":
    main()
