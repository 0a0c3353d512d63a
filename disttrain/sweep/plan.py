"""The plan of a sweep: which settings it trains, and the names of their runs. Pure.

A key may have several values, as in Hydra: `optim.lr=0.05,0.1`, `seed=0..4`. With draws, it may also have a
range, as in Ray Tune: `optim.lr=loguniform(0.01,1)`. Values are text until the config reads them as YAML.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from disttrain.config import Config, parse_config, shown
from disttrain.errors import UsageError
from disttrain.runs.fingerprint import changes_since
from disttrain.urls import without_secrets

MOST_RUNS = 2000
"""More are most likely a mistake: checking them takes half a minute, and the report cannot show them."""

_SEED = "seed"
_MOST_LINES = 20  # of mistakes or differences that are shown
_NAME_BYTES = 180  # file systems hold 255
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|.', re.DOTALL)
_WHOLE_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)")
_RANGE = re.compile(r"(uniform|loguniform)\((.*)\)")


class Range(NamedTuple):
    """Numbers to draw from: uniform, or uniform in the logarithm."""

    low: float
    high: float
    log: bool

    def draw(self, share: float) -> str:
        """Returns the number at a share (0..1) of the range, with four digits."""
        if self.log:
            exact = self.low * (self.high / self.low) ** share
        else:
            exact = self.low + (self.high - self.low) * share
        return f"{min(max(float(f'{exact:.4g}'), self.low), self.high):.10g}"


class PlannedRun(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: of its run folder, such as `optim.lr=0.1,seed=0`.
        values: the keys in which the runs of the sweep differ, with their values.
        overrides: all overrides of the run, as `disttrain run` takes them.
    """

    name: str
    values: dict[str, str]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A sweep, as sweep.json has it.

    Attributes:
        config: the config file, as given.
        overrides: as given.
        draws: number of random settings; None for a grid.
        draw_seed: of the random settings.
        runs: in the order in which they are started.
        first: the resolved config of the first run.
    """

    config: str
    overrides: tuple[str, ...]
    draws: int | None
    draw_seed: int
    runs: tuple[PlannedRun, ...]
    first: dict[str, Any]


def plan_runs(overrides: Sequence[str], draws: int | None = None, draw_seed: int = 0) -> list[PlannedRun]:
    """Returns the runs of a sweep: every combination of the values, or random ones.

    Random settings depend on `draw_seed` alone, and more draws only add to them. Each is trained with every
    seed.

    Args:
        overrides: `key=value`, `key=value,value`, `key=first..last` or `key=uniform(low,high)`.
        draws: number of random settings; None means every combination.
        draw_seed: of the random settings.

    Raises:
        UsageError: an override is wrong, or the number of combinations is 0, 1 or too large.
    """
    axes: dict[str, list[str] | Range] = {}
    problems = []
    for override in overrides:
        try:
            key, values = _axis(override, draws is not None)
            if key in axes:
                raise UsageError(f"{key} is given twice; put all its values into one list")
            axes[key] = values
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    swept = {key: values for key, values in axes.items() if isinstance(values, Range) or len(values) > 1}
    if not swept:
        raise UsageError("nothing to sweep; give a key several values, such as optim.lr=0.05,0.1,0.2")
    grid = {key: values for key, values in swept.items() if draws is None or key == _SEED}
    lists = [values for values in grid.values() if isinstance(values, list)]
    count = math.prod(map(len, lists)) * (draws or 1)
    if count > MOST_RUNS:
        raise UsageError(f"{count:,} runs are more than {MOST_RUNS:,}; use shorter lists or --draws N")
    drawn: list[dict[str, str]] = [{}]
    if draws is not None:
        drawn = _draw({key: values for key, values in swept.items() if key not in grid}, draws, draw_seed)
    chosen = [
        settings | dict(zip(grid, values, strict=True))
        for settings in drawn
        for values in itertools.product(*lists)
    ]
    shown = [{key: without_secrets(settings[key]) for key in swept} for settings in chosen]
    fixed = {key: values[0] for key, values in axes.items() if isinstance(values, list)}
    return [
        PlannedRun(name, values, tuple(f"{key}={(fixed | settings)[key]}" for key in axes))
        for name, values, settings in zip(_names(shown), shown, chosen, strict=True)
    ]


def make_plan(
    text: str,
    source: str,
    overrides: Sequence[str],
    *,
    draws: int | None,
    draw_seed: int,
    check: Callable[[Config], None],
) -> tuple[Plan, list[Config]]:
    """Returns the plan of a sweep, and the config of each of its runs.

    Args:
        text: the YAML of the config file.
        source: its name, for messages.
        overrides: as for `plan_runs`.
        draws: as for `plan_runs`.
        draw_seed: as for `plan_runs`.
        check: raises UsageError if a config does not fit this machine.

    Raises:
        UsageError: some runs are wrong, with a line for each mistake; or two are the same.
    """
    configs: dict[str, Config] = {}
    problems: dict[str, None] = {}
    runs = plan_runs(overrides, draws, draw_seed)
    for run in runs:
        try:
            configs[run.name] = parse_config(text, source, run.overrides)
            check(configs[run.name])
        except UsageError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise UsageError("\n".join(_shortened(list(problems))))
    names: dict[str, str] = {}
    for name, config in configs.items():
        other = names.setdefault(config.model_dump_json(), name)
        if other != name:
            raise UsageError(f"{other} and {name} are the same settings; leave one out")
    plan = Plan(
        source,
        tuple(map(without_secrets, overrides)),
        draws,
        draw_seed,
        tuple(run._replace(overrides=tuple(map(without_secrets, run.overrides))) for run in runs),
        shown(configs[runs[0].name]).model_dump(mode="json"),
    )
    return plan, list(configs.values())


def check_same(folder: str, old: Plan, new: Plan, configs: Sequence[Config]) -> None:
    """Checks that a plan may go on in the folder of another: it only adds runs.

    Args:
        folder: of the sweep, for messages.
        old: the plan in the folder.
        new: the plan to go on with.
        configs: of the runs of `new`.

    Raises:
        UsageError: a run is gone, or its config has changed in a way that a resume does not allow.
    """
    now = {run.name: config for run, config in zip(new.runs, configs, strict=True)}
    changes = [f"{run.name}: is not in the new plan" for run in old.runs if run.name not in now]
    first = now.get(old.runs[0].name)
    if first is not None:
        document = {"config": shown(first).model_dump(mode="json"), "data": {}}
        changes = changes_since({"config": old.first}, document) + changes
    if changes:
        lines = [f"{folder}: holds another sweep:", *_shortened(changes)]
        raise UsageError("\n  ".join(lines) + "\nundo the change, or choose another --sweep-dir")


def _axis(override: str, drawing: bool) -> tuple[str, list[str] | Range]:
    """Returns the key of an override, and its values."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override; write key=value, for example optim.lr=0.1")
    if key == "monitor.on_end":  # sweep.json would have the tokens in it
        raise UsageError("monitor.on_end: a sweep takes it from the config file only; write it there")
    if found := _RANGE.fullmatch(text.strip()):
        if not drawing:
            raise UsageError(f"{override}: a range needs --draws N; or list the values")
        return key, _range(override, found[1] == "loguniform", found[2])
    parts = _split(text)
    values = [value for part in parts for value in _whole_numbers(override, part)]
    if len(parts) > 1 and "" in values:
        raise UsageError(f"{override}: there is no value between two commas; write null for none")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UsageError(f"{override}: {twice} is given twice; leave one out")
    return key, values


def _split(text: str) -> list[str]:
    """Returns the values of a list; commas in quotes and brackets do not separate."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in "[{(") - (token in "]})")
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _whole_numbers(override: str, text: str) -> list[str]:
    """Returns the numbers of `first..last`; any other text is one value."""
    found = _WHOLE_NUMBERS.fullmatch(text)
    if found is None:
        return [text]
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise UsageError(f"{override}: {text} has no numbers; write the smaller one first")
    if last - first >= MOST_RUNS:
        raise UsageError(f"{override}: {text} has more than {MOST_RUNS:,} numbers; use a shorter list")
    return [str(number) for number in range(first, last + 1)]


def _range(override: str, log: bool, bounds: str) -> Range:
    try:
        low, high = map(float, bounds.split(","))
    except ValueError:
        raise UsageError(f"{override}: a range has two numbers, such as uniform(0,0.5)") from None
    if not -math.inf < low < high < math.inf or (log and low <= 0):
        least = "above 0 and " * log
        raise UsageError(f"{override}: the first number must be {least}below the second")
    return Range(low, high, log)


def _draw(axes: Mapping[str, list[str] | Range], draws: int, seed: int) -> list[dict[str, str]]:
    """Returns different random settings."""
    if not axes:
        raise UsageError("--draws needs a list or a range to draw from, such as optim.lr=loguniform(0.01,1)")
    lists = [values for values in axes.values() if isinstance(values, list)]
    if len(lists) == len(axes) and (count := math.prod(map(len, lists))) < draws:
        raise UsageError(f"--draws {draws}: there are only {count} combinations; leave --draws out")
    generator = random.Random(seed)
    found: dict[tuple[str, ...], None] = {}
    for _ in range(1000 + 100 * draws):
        shares = [generator.random() for _ in axes]
        setting = tuple(
            values.draw(share) if isinstance(values, Range) else values[int(share * len(values))]
            for values, share in zip(axes.values(), shares, strict=True)
        )
        found[setting] = None
        if len(found) == draws:
            return [dict(zip(axes, values, strict=True)) for values in found]
    raise UsageError(f"--draws {draws}: the ranges are too narrow for so many; widen them or draw fewer")


def _names(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns a name for each run that a file system can hold; all are different."""
    names = []
    for values in runs:
        exact = ",".join(f"{key}={value}" for key, value in values.items())
        name = re.sub(r"[^\w.,=+-]", "_", exact)
        if len(name.encode()) > _NAME_BYTES or name in names:
            cut = name.encode()[:_NAME_BYTES].decode(errors="ignore")
            name = f"{cut}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
        names.append(name)
    return names


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], f"... and {more:,} more"]
