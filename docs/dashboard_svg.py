"""Draws the dashboard of a finished run as a picture: python docs/dashboard_svg.py RUN OUTPUT.svg."""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import rich.console
import yaml

from disttrain.console import Console, RunInfo


def main() -> None:
    """Replays metrics.jsonl of a run and saves the last frame."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("output", type=Path, help="SVG file to write")
    parser.add_argument("--records", type=int, help="stop after so many lines of metrics.jsonl")
    args = parser.parse_args()
    lines = (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    frame = _replay(_run_info(args.run), [json.loads(line) for line in lines[: args.records]])
    picture = rich.console.Console(file=io.StringIO(), record=True, width=100, height=30)
    picture.print(frame)
    picture.save_svg(str(args.output), title="disttrain run")


def _run_info(run: Path) -> RunInfo:
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    env = json.loads((run / "env.json").read_text(encoding="utf-8"))
    data = env.get("data", {})
    shape = "x".join(map(str, data.get("shape", [])))
    names = Counter(device.get("name") or device.get("device", "?") for device in env.get("devices", []))
    return RunInfo(
        name=config["name"],
        run_dir=str(run),
        model=config["model"]["name"],
        parameters=env.get("model", {}).get("parameters", 0),
        data=f"{config['data']['name']} {data.get('train', 0):,} train, {data.get('val', 0):,} val, {shape}",
        devices=", ".join(f"{count} x {name}" for name, count in names.items()),
        precision=env.get("precision", config["train"].get("precision", "?")),
        batch_size=config["train"]["batch_size"],
        epochs=config["train"]["epochs"],
        steps_per_epoch=env.get("steps_per_epoch", 0),
        samples_per_epoch=data.get("train", 0),
    )


def _replay(info: RunInfo, records: list[dict[str, Any]]) -> rich.console.RenderableType:
    """Returns the frame after the records, on a clock that runs at the speed which they report."""
    now_s, position = 0.0, (0, 0)
    console = Console(info, verbosity=0, position=lambda: position, stream=io.StringIO(), clock=lambda: now_s)
    console.start()
    for before, record in itertools.pairwise([{}, *records]):
        if record["kind"] == "train":
            steps = record["step"] - before.get("step", 0)
            now_s += steps * (record.get("step_time_s") or 0.0)
            position = (record["step"], record["samples"])
            console.train(record)
        elif record["kind"] == "eval":
            console.evaluate(record)
    return console.render()


if __name__ == "__main__":
    main()
