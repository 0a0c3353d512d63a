"""Draws the dashboard of a run as a picture, as it was: python docs/dashboard_svg.py RUN OUTPUT.svg."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import rich.console

from disttrain.monitor.console import Console, RunInfo
from disttrain.runs.runfolder import RunFolder


def main() -> None:
    """Replays metrics.jsonl of a run and saves the last frame."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("output", type=Path, help="SVG file to write")
    parser.add_argument("--records", type=int, help="stop after so many lines of metrics.jsonl")
    args = parser.parse_args()
    lines = (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    env = json.loads((args.run / "env.json").read_text(encoding="utf-8"))
    verdict = RunFolder(args.run).status().get("verdict") or {}
    records = [json.loads(line) for line in lines[: args.records]]
    frame = _replay(RunInfo(**env["run"]), records, verdict.get("text", ""))
    picture = rich.console.Console(file=io.StringIO(), record=True, width=100, height=30)
    picture.print(frame)
    svg = picture.export_svg(title="disttrain run")
    own = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # rich would load a font from the network
    args.output.write_text(own.replace("Fira Code, monospace", "monospace"), encoding="utf-8")


def _replay(info: RunInfo, records: list[dict[str, Any]], verdict: str) -> rich.console.RenderableType:
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
    console.verdict(verdict)
    return console.render()


if __name__ == "__main__":
    main()
