"""Draws the dashboard of a past run as an SVG: python docs/dashboard_svg.py RUN OUTPUT.svg."""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path
from typing import Any

import rich.console

from disttrain.monitor.dashboard import Dashboard, RunInfo
from disttrain.monitor.verdict import Evidence, evidence, judge, places_of
from disttrain.monitor.widgets import Frame
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
    environment = json.loads(folder.env.read_text(encoding="utf-8"))
    records = [record for part in parts(folder.metrics, METRICS) for record in part.rows]
    shown = _replay(environment, records[: args.records])
    picture = rich.console.Console(file=io.StringIO(), record=True, width=110, height=36)
    picture.print(Frame(shown.lines))
    svg = picture.export_svg(title="disttrain run")
    own = re.sub(
        r"@font-face \{.*?\}", "", svg, flags=re.DOTALL
    )  # otherwise the SVG loads a font from the network
    args.output.write_text(own.replace("Fira Code, monospace", "monospace"), encoding="utf-8")


def _replay(environment: dict[str, Any], records: list[TrainRecord | EvalRecord]) -> Dashboard:
    """Returns the dashboard after the records; its clock follows the step times."""
    shown = Dashboard(RunInfo(**environment["run"]), state="training")
    for record in records:
        shown.add(record)
        if isinstance(record, TrainRecord):
            shown.elapsed_s += (record.step - shown.step) * record.step_time_s
            shown.step, shown.samples = record.step, record.samples
    shown.pace = shown.samples / shown.elapsed_s
    choices = {key: text.partition(":")[0] for key, text in environment["choices"].items()}
    setting = Evidence(
        where=places_of([device["host"] for device in environment["devices"]]),
        cache=choices["cache"],
        precision=choices["precision"],
        compiled=choices["compile"] == "true",
    )
    trained = [record for record in records if isinstance(record, TrainRecord)]
    shown.evidence = evidence(trained[1:][-10:], setting)
    shown.verdict = judge(shown.evidence).text if shown.evidence else ""
    return shown


if __name__ == "__main__":
    main()
