"""Draws the dashboard of a past run as an SVG: python docs/dashboard_svg.py RUN OUTPUT.svg."""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import rich.console

from disttrain.monitor.console import Console, RunInfo
from disttrain.runs.jsonl import parts
from disttrain.runs.records import METRICS, EvalRecord, TrainRecord
from disttrain.runs.runfolder import RunFolder


def main() -> None:
    """Replays metrics.jsonl of a run and saves the last frame."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("output", type=Path, help="SVG file to write")
    parser.add_argument("--records", type=int, help="stop after this many lines of metrics.jsonl")
    args = parser.parse_args()
    folder = RunFolder(args.run)
    info = json.loads(folder.env.read_text(encoding="utf-8"))["run"]
    verdict = folder.status().get("verdict") or {}
    records = [record for part in parts(folder.metrics, METRICS) for record in part.rows]
    frame = _replay(RunInfo(**info), records[: args.records], verdict.get("text", ""))
    picture = rich.console.Console(file=io.StringIO(), record=True, width=100, height=30)
    picture.print(frame)
    svg = picture.export_svg(title="disttrain run")
    own = re.sub(
        r"@font-face \{.*?\}", "", svg, flags=re.DOTALL
    )  # otherwise the SVG loads a font from the network
    args.output.write_text(own.replace("Fira Code, monospace", "monospace"), encoding="utf-8")


def _replay(
    info: RunInfo, records: list[TrainRecord | EvalRecord], verdict: str
) -> rich.console.RenderableType:
    """Returns the frame after the records, with a clock that follows their step times."""
    now_s, position = 0.0, (0, 0)
    console = Console(info, verbosity=0, position=lambda: position, stream=io.StringIO(), clock=lambda: now_s)
    console.start()
    for record in records:
        if isinstance(record, TrainRecord):
            now_s += (record.step - position[0]) * record.step_time_s
            position = (record.step, record.samples)
            console.train(record)
        else:
            console.evaluate(record)
    console.verdict(verdict)
    return console.render()


if __name__ == "__main__":
    main()
