"""What rank 0 shows: the dashboard at fixed sizes, exact lines elsewhere, and a real terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from rich.cells import cell_len
from rich.console import Console as RichConsole

from disttrain.heartbeat import Phase
from disttrain.monitor.console import Console, eval_line, train_line
from disttrain.monitor.dashboard import RunInfo, eta
from disttrain.monitor.verdict import Evidence
from disttrain.monitor.widgets import bar
from disttrain.runs.records import GpuMeans, Process, TrainRecord
from kit.console import EVAL, INFO, TRAIN, gpus, line, timeless
from kit.run_files import write_lines


def processes(count: int) -> tuple[Process, ...]:
    return tuple(Process(rank=i, host="a", cpu_pct=398.1, memory_used_mib=1234) for i in range(count))


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def dashboard(info: RunInfo = INFO, **options: Any) -> Console:
    options = {
        "verbosity": 0,
        "position": lambda: (0, 0),
        "stream": Screen(),
        "clock": Clock(),
    } | options
    return Console(info, **options)


def frame(shown: Console, width: int = 80, height: int = 24, **options: Any) -> list[str]:
    screen = RichConsole(file=io.StringIO(), width=width, height=height, **options)
    screen.print(shown.render())
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().splitlines()


def test_the_best_evaluation_is_that_of_the_metric() -> None:
    shown = dashboard(dataclasses.replace(INFO, best="loss"))
    shown.evaluate(replace(EVAL, epoch=1, loss=0.5, accuracy=0.8, correct=8000))
    shown.evaluate(EVAL)
    now = "eval     81.23 % (8,123/10,000)"
    assert line(frame(shown, 120, 40), "eval") == f"{now}   best validation loss 0.5000 in epoch 1"
    shown = dashboard(dataclasses.replace(INFO, best="macro_f1"))
    shown.evaluate(EVAL)
    assert line(frame(shown, 120, 40), "eval") == now, "an old record without macro F1"


AWKWARD = dataclasses.replace(
    INFO,
    name="[bold]評価[/bold] " * 20,
    run_dir="/数据/" + "x" * 300,
    model="[red]m[/]\n\x1b[2J",
    devices="非常に長い名前" * 20,
)

UNKNOWN_GPU = GpuMeans(host="", index=None, uuid="GPU-x")


@pytest.mark.parametrize("size", [(80, 24), (200, 24), (200, 50), (132, 43), (40, 10), (12, 3), (1, 1)])
@pytest.mark.parametrize("info", [INFO, AWKWARD], ids=["plain", "awkward"])
@pytest.mark.parametrize(
    "record",
    [
        None,
        replace(TRAIN, gpus=gpus(1)),
        replace(TRAIN, gpus=gpus(4)),
        replace(TRAIN, gpus=gpus(8)),
        replace(TRAIN, gpus=gpus(64, hosts=8)),
        replace(TRAIN, gpus=tuple(replace(gpu, host="ノード" * 9 + gpu.host) for gpu in gpus(64, hosts=8))),
        replace(TRAIN, processes=processes(2)),
        replace(TRAIN, processes=processes(64)),
        replace(TRAIN, gpus=(UNKNOWN_GPU, UNKNOWN_GPU, *gpus(1))),
        replace(TRAIN, loss=math.nan, gpus=(UNKNOWN_GPU,), images_per_s=math.inf),
        replace(TRAIN, loss=1e30, images_per_s=1e15, accuracy=1.0, step_time_s=1e6),
    ],
    ids=["start", "1", "4", "8", "64", "wide", "cpu", "cpu64", "unknown", "nan", "huge"],
)
def test_a_frame_never_overflows(size: tuple[int, int], info: RunInfo, record: TrainRecord | None) -> None:
    width, height = size
    shown = dashboard(info)
    for _ in range(120 if record else 0):
        shown.train(record)
    shown.evaluate(EVAL)
    for text in ("first", "[bold]second[/bold]", "third " * 99, "fourth\nwith a line break"):
        shown.note(text)
    lines = frame(shown, width, height)
    assert len(lines) < max(2, height)  # a line is left for the outcome
    assert max(map(cell_len, lines)) <= width
    if size == (80, 24):
        assert "first" not in "".join(lines)
        assert line(lines, "notes").endswith("[bold]second[/bold]")


EVIDENCE = Evidence(step_s=0.028, data_s=0.0014, to_device_s=0.0014, communication_s=0.0056)


def test_a_frame_says_what_it_is_told() -> None:
    clock = Clock()
    position = (234, 119_552)
    shown = dashboard(position=lambda: position, clock=clock)
    clock.now_s = 727
    shown.train(replace(TRAIN, step=117, loss=0.5, gpus=()))
    shown.train(replace(TRAIN, gpus=gpus(2)[::-1]))
    shown.evaluate(replace(EVAL, step=98, epoch=1, accuracy=0.9, correct=9000))
    shown.evaluate(EVAL)
    lines = frame(shown, 120, 40)
    assert re.fullmatch(r"disttrain  alexnet  training +\d\d:\d\d:\d\d UTC   elapsed 00:12:07", lines[0])
    assert lines[1:4] == [
        "alexnet_cifar, 2,466,000 parameters, bf16, batch 512",
        "cifar10 50,000 train, 10,000 val, 3x32x32",
        "runs/alexnet/1",
    ]
    assert re.fullmatch(r"epoch +━+╾?─+ +39 % +3/10  ETA 00:00:01", line(lines, "epoch"))
    assert re.fullmatch(r"total +━+╾?─+ +23 %  step 234/980  ETA 00:00:20", line(lines, "total"))
    assert line(lines, "train") == "train    lr 1.0e-03"
    assert line(lines, "step") == "step     28.1 ms"
    assert line(lines, "eval") == "eval     81.23 % (8,123/10,000)   best 90.00 % (9,000/10,000) in epoch 1"
    assert line(lines, "── 234 steps, 00:00:06 of training")
    heads = r"loss 0\.1234  • eval +accuracy 96\.12 %  • eval +images/s 18,200"
    assert re.fullmatch(heads, line(lines, "loss"))
    assert sum("H100" in row for row in lines) == 1
    first, second = line(lines, "GPU 0"), line(lines, "GPU 1")
    assert re.fullmatch(r"GPU 0 +▃+ +30 % +12.1/79.6 GiB +612/n/a +64 °C", first)
    assert re.fullmatch(r"GPU 1 +▃+ +31 % +12.1/79.6 GiB +612/n/a +64 °C", second)
    titles = lines[lines.index(first) - 1]
    assert re.fullmatch(r" +use over the run +use +memory +power +temp", titles)
    assert lines.index(first) < lines.index(second)


def test_the_speed_and_its_parts_are_those_of_the_verdict() -> None:
    shown = dashboard()
    shown.train(replace(TRAIN, gpus=gpus(2), step_time_s=0.5, images_per_s=1.0))
    shown.verdict(f"compute-bound: 70 % {'so it is ' * 9}; set data.cache=host", EVIDENCE)
    lines = frame(shown)
    assert line(lines, "step") == "step     28.0 ms   ░ input 10 %   █ computing 70 %   ▒ communication 20 %"
    assert "images/s 18,286" in line(lines, "train")
    first = lines.index(line(lines, "verdict"))
    assert "set data.cache=host" in lines[first + 1]
    assert lines[first + 1].startswith(" " * 9)
    wide = frame(shown, 200)
    assert line(wide, "verdict").rstrip().endswith("set data.cache=host")
    assert re.search(r"░{6}█{42}▒{12}$", line(wide, "step"))


def test_the_arithmetic_of_a_device_is_shown_where_it_is_known() -> None:
    shown = dashboard()
    shown.train(replace(TRAIN, device_flops_per_s=412_300_000_000_000, mfu_pct=41.7, grad_norm=1.25))
    assert re.search(
        r"lr 1.0e-03 +gradient norm 1.25 +412.3 TFLOP/s +MFU 42 %$", line(frame(shown, 120), "train")
    )
    shown.train(replace(TRAIN, device_flops_per_s=12_340_000_000, mfu_pct=None))
    assert line(frame(shown, 120), "train").endswith("12.3 GFLOP/s")


def test_the_pace_leaves_out_the_start_and_counts_the_pauses() -> None:
    clock = Clock()
    position = (0, 0)
    shown = dashboard(position=lambda: position, clock=clock)
    assert line(frame(shown), "total").endswith("ETA      n/a")
    clock.now_s = 1000.0  # reading the data, compiling
    frame(shown)
    clock.now_s, position = 1100.0, (98, 50_000)
    assert "100 %" in line(frame(shown), "epoch")
    assert "1/10" in line(frame(shown), "epoch")
    assert line(frame(shown), "total").endswith("10 %  step 98/980  ETA 00:15:00")
    clock.now_s, position = 1200.0, (980, 500_000)
    assert line(frame(shown), "total").endswith("100 %  step 980/980  ETA 00:00:00")


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        (Phase.START, "starting"), (Phase.COMPUTE, "training"), (Phase.REPORT, "training"),
        (Phase.EVALUATE, "evaluating"), (Phase.SAVE, "saving"), (Phase.END, "finishing"),
    ],
)  # fmt: skip
def test_the_phase_stands_in_the_first_line(phase: Phase, state: str) -> None:
    assert f"alexnet  {state} " in frame(dashboard(phase=lambda: phase))[0]


def test_the_last_frame_says_how_it_ended_and_the_path_has_a_line() -> None:
    stream = Screen()
    path = "runs/" + "long" * 30
    shown = dashboard(dataclasses.replace(INFO, run_dir=path), stream=stream)
    with shown:
        shown.train(TRAIN)
        shown.verdict("compute-bound: so it is", EVIDENCE, final=True)
        shown.finish("finished: accuracy 81 %", ok=True)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    last = text[text.rindex("alexnet  finished") :].splitlines()
    assert [row.rstrip() for row in last[-2:]] == ["finished: accuracy 81 %", f"run folder {path}"]
    assert sum("compute-bound" in row for row in last) == 1
    assert "alexnet  finished" in frame(shown)[0]
    failed = dashboard()
    with contextlib.suppress(RuntimeError), failed:
        raise RuntimeError
    assert "alexnet  failed" in frame(failed)[0]


def test_on_a_low_terminal_what_changes_stays() -> None:
    shown = dashboard(position=lambda: (234, 119_552))
    shown.train(replace(TRAIN, gpus=gpus(8)))
    shown.evaluate(EVAL)
    shown.verdict("compute-bound: so it is", EVIDENCE)
    shown.note("saved")
    lines = frame(shown, 38, 14)
    assert len(lines) == 13
    for expected in ("elapsed", "training", "3/10", "234/980", "loss 0.1234", "accuracy 96.12 %", "28.0 ms",
                     "best 81.23 %", "compute-bound", "GPU 0", "+", "saved"):  # fmt: skip
        assert any(expected in row for row in lines), expected
    assert not any("parameters" in row or "runs/" in row for row in lines)


def test_unknown_values_are_not_numbers() -> None:
    shown = dashboard()
    shown.train(replace(TRAIN, gpus=(UNKNOWN_GPU,)))
    text = "\n".join(frame(shown))
    assert re.search(r"GPU n/a +n/a +n/a/n/a +n/a/n/a +n/a *$", text, re.MULTILINE)
    assert "None" not in text


def test_graphs_show_the_whole_run_and_earlier_starts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = range(20, 2020, 20)
    records = [replace(TRAIN, step=step, loss=2.0 - step / 2000, gpus=gpus(1)) for step in steps]
    write_lines(path, [*records, replace(EVAL, step=2000, epoch=20)])
    shown = dashboard()
    shown.recall(path)
    lines = frame(shown, 120, 40)
    assert line(lines, "eval") == "eval     81.23 % (8,123/10,000)   best 81.23 % (8,123/10,000) in epoch 20"
    assert not any(row.startswith("GPU") for row in lines), "readings of the past are not shown as present"
    shown.train(replace(TRAIN, step=4000, loss=0.5, gpus=gpus(1)))
    lines = frame(shown, 120, 40)
    assert line(lines, "── 4,000 steps")
    top = lines.index(line(lines, "loss")) + 1
    curve = [row[:39] for row in lines[top : lines.index(line(lines, "── 4 x"))]]
    assert curve[0].lstrip().startswith("1.9")
    assert curve[-1].lstrip().startswith("0.5│")
    assert [bool(re.search("[⠁-⣿]", row)) for row in curve] == [True] * len(curve), (
        "one line from top to bottom"
    )


def test_of_many_gpus_those_with_a_problem_are_shown_first() -> None:
    shown = dashboard()
    rows = [replace(gpu, utilization_pct=95.0) for gpu in gpus(64, hosts=8)]
    rows[60] = replace(rows[60], utilization_pct=3.0)
    rows[50] = replace(rows[50], throttled_thermal_pct=40.0)
    rows[40] = replace(rows[40], utilization_pct=None, memory_used_mib=None, critical_events=1)
    shown.train(replace(TRAIN, gpus=tuple(rows)))
    lines = frame(shown)
    found = [row for row in lines if " GPU " in row]
    assert [row.split()[:4] for row in found[:3]] == [
        ["node5", "GPU", "0", "lost"], ["node6", "GPU", "2", "hot"], ["node7", "GPU", "4", "idle"],
    ]  # fmt: skip
    hidden = 64 - sum(row.count(" GPU ") for row in found)
    assert line(lines, "+") == f"+{hidden} more   use of all 64: mean 94 %, least 3 %, most 95 %"
    lines = frame(shown, 200, 50)
    assert not [row for row in lines if row.startswith("+")]
    assert sum(row.count(" GPU ") for row in lines) == 64


def test_eight_gpus_and_the_graphs_fit_the_usual_terminal() -> None:
    shown = dashboard()
    rows = [replace(gpu, utilization_pct=95.0) for gpu in gpus(8)]
    rows[6] = replace(rows[6], utilization_pct=3.0)
    shown.train(replace(TRAIN, gpus=tuple(rows)))
    lines = frame(shown)
    assert sum(row.count("GPU ") for row in lines) == 8
    assert any("GPU 6 idle" in row for row in lines)
    assert line(lines, "── 4 x NVIDIA H100 ──"), "the name of the GPUs stands once"
    assert any(re.match(r" .* use +memory", row) for row in lines), "named columns"
    assert re.fullmatch(r"loss 0\.1234 +accuracy 96\.12 %", line(lines, "loss"))


def test_gpus_of_several_kinds_are_named_each() -> None:
    shown = dashboard()
    first, second = gpus(2)
    shown.train(replace(TRAIN, gpus=(first, replace(second, name="NVIDIA A100"))))
    lines = frame(shown, 120)
    assert line(lines, "GPU 1").endswith("NVIDIA A100")
    assert line(lines, "GPU 0").endswith("NVIDIA H100")


def test_hosts_are_named_when_there_are_several_by_the_end_of_their_names() -> None:
    shown = dashboard()
    rows = gpus(2, hosts=2)
    for row, name in zip(
        rows, ("a-very-long-cluster-node-0007.example.org", "short.example.org"), strict=True
    ):
        row.host = name
    shown.train(replace(TRAIN, gpus=rows))
    lines = frame(shown)
    assert line(lines, "…ter-node-0007 GPU 0")
    assert line(lines, "short GPU 0")


def test_processes_are_shown_where_there_are_no_gpus() -> None:
    shown = dashboard()
    shown.train(replace(TRAIN, processes=processes(2)))
    lines = frame(shown)
    assert re.fullmatch(r"rank 1 ▇+ +398 % +1.2 GiB", line(lines, "rank 1"))
    assert re.fullmatch(
        r" +use over the run +of one core +memory", lines[lines.index(line(lines, "rank 0")) - 1]
    )


def test_colour_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = dashboard(position=lambda: (234, 119_552))
    shown.train(replace(TRAIN, gpus=gpus(4)))
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", "\n".join(frame(shown, force_terminal=True)))
    monkeypatch.setenv("NO_COLOR", "1")
    plain = "\n".join(frame(shown, force_terminal=True))
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9]", plain)
    assert re.search(r"━+╾?─+", plain)


def test_bar() -> None:
    assert bar(0.0, 4) == ("", "────")
    assert bar(0.5, 4) == ("━━", "──")
    assert bar(0.64, 4) == ("━━╾", "─")
    assert bar(2.0, 4) == ("━━━━", "")
    assert bar(-1.0, 0) == ("", "")


def test_the_time_left() -> None:
    assert (eta(100, 50), eta(100, None), eta(100, 0)) == ("00:00:02", "n/a", "n/a")


def test_lines() -> None:
    assert train_line(replace(TRAIN, gpus=gpus(4)), INFO) == (
        "epoch  3/10  step 234/980  loss  0.1234  acc  96.12 %  lr 1.0e-03     18,200 images/s"
        "  wait   2 %  gpu  32 %"
    )
    assert train_line(replace(TRAIN, step=980, epoch=10, processes=processes(2)), INFO) == (
        "epoch 10/10  step 980/980  loss  0.1234  acc  96.12 %  lr 1.0e-03     18,200 images/s"
        "  wait   2 %  cpu 398 %"
    )
    assert train_line(replace(TRAIN, gpus=(UNKNOWN_GPU,)), INFO) == (
        "epoch  3/10  step 234/980  loss  0.1234  acc  96.12 %  lr 1.0e-03     18,200 images/s"
        "  wait   2 %  gpu   n/a"
    )
    assert eval_line(EVAL, INFO) == (
        "epoch  2/10  step 196/980  loss  0.6100  acc  81.23 %  eval: 8,123 of 10,000 correct"
    )


def test_a_file_gets_plain_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    with dashboard(stream=stream, clock=clock) as shown:
        for now_s in (0, 1, 9.9, 10, 11, 19, 20.5):
            clock.now_s = now_s
            shown.train(replace(TRAIN, step=int(now_s) + 1))
        shown.evaluate(EVAL)
        shown.note("saved [bold]checkpoint[/bold]\x1b[31m")
        shown.finish("finished", ok=True)
    lines = timeless(stream.getvalue())
    assert re.fullmatch(r"disttrain alexnet  \d{4}-\d\d-\d\d UTC", lines[0])
    assert lines[1:4] == [
        "model  alexnet_cifar, 2,466,000 parameters, bf16, 4 x NVIDIA H100",
        "data   cifar10 50,000 train, 10,000 val, 3x32x32, batch 512",
        "run    runs/alexnet/1",
    ]
    assert [re.findall(r"step +(\d+)", line) for line in lines[4:7]] == [["1"], ["11"], ["21"]]
    assert lines[7:] == [
        eval_line(EVAL, INFO),
        "saved [bold]checkpoint[/bold]?[31m",
        "finished, run folder runs/alexnet/1",
    ]


def test_verbose_is_a_line_for_each_record_and_quiet_the_outcome_alone() -> None:
    for verbosity, expected in ((1, 4 + 3 + 3), (0, 4 + 1 + 3)):
        stream = io.StringIO()
        shown = dashboard(stream=stream, verbosity=verbosity)
        feed(shown)
        assert len(timeless(stream.getvalue())) == expected
    stream = io.StringIO()
    feed(dashboard(stream=stream, verbosity=-1))
    assert stream.getvalue() == "finished, run folder runs/alexnet/1\n"


def feed(shown: Console) -> None:
    with shown:
        for _ in range(3):
            shown.train(TRAIN)
        shown.evaluate(EVAL)
        shown.note("saved")
        shown.finish("finished", ok=True)


class Failing(io.StringIO):
    """A stream that is a terminal and breaks on its third write."""

    writes = 0

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes >= 3:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_broken_stream_does_not_stop_training(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Failing(terminal)
    feed(dashboard(stream=stream))
    assert stream.writes == 3  # and then no more
    closed = io.StringIO()
    closed.close()
    feed(dashboard(stream=closed))


def test_each_line_is_flushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("w") as stream:
        shown = dashboard(stream=stream)
        shown.note("at once")
        assert path.read_text().endswith("at once\n")


def test_a_terminal_without_utf8_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    raw = io.BytesIO()
    info, stream = dataclasses.replace(INFO, name="naïve"), Terminal(raw, encoding="ascii")
    feed(dashboard(info, stream=stream, position=lambda: (234, 119_552)))
    text = raw.getvalue().decode("ascii")
    assert "na?ve" in text
    assert re.search("#+-+", text)
