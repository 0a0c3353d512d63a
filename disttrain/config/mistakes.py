"""The mistakes in a config: for each its place, and a sentence with the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import pydantic
from pydantic import BaseModel

from disttrain.config.schema import Config, OptimizerFields, ScheduleConfig, frozen_patterns
from disttrain.config.yaml12 import Key, dotted_name
from disttrain.user_code import did_you_mean

Problem = tuple[Key, str]
"""The place of a mistake, and a sentence that starts with its dotted key."""

_OTHER_NAMES = {  # of keys in other tools
    "learning_rate": "optim.lr",
    "max_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_lr": "optim.lr",
    "optimizer": "optim",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "amp": "train.precision",
    "mixed_precision": "train.precision",
    "dataset": "data",
    "accumulate_grad_batches": "train.accumulate",
    "grad_accum_steps": "train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clip_val": "train.grad_clip",
    "drop_last": "data.remainder",
    "num_workers": "data.workers",
    "min_lr_ratio": "schedule.final_ratio",
    "max_grad_norm": "train.grad_clip",
    "ema_decay": "train.ema",
    "training": "train",
    "evaluation": "eval",
}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a section (key: value)",
    "dict_type": "a section (key: value)",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', with a letter or digit first",
}
_EXPECTED_BY_KEY = {
    "train.compile": "auto, true or false",
    "train.channels_last": "auto, true or false",
    "train.cuda_graph": "auto, true or false",
    "augment.flip": "true, false or alternating",
    "optim.betas": "two numbers, such as [0.9, 0.999]",
    "train.class_weights": "balanced, null or a list with a number per class",
}
_OWNERS = {
    "momentum": ("sgd", "muon"),
    "nesterov": ("sgd", "muon"),
    "betas": ("adam", "adamw", "muon"),
    "adjust_lr": ("muon",),
    "normalize_weights": ("muon",),
}


def explained(error: pydantic.ValidationError) -> list[Problem]:
    """Returns the problems that pydantic found, one for each key."""
    problems = {}
    for item in error.errors():
        key = item["loc"]
        if item["type"] != "extra_forbidden":  # a union appends its branch ("literal['auto']") to the key
            key = tuple(part for i, part in enumerate(key) if isinstance(part, int) or _is_key(key[: i + 1]))
        problems[key] = dotted_name(key) + _remark(key, item)
    return list(problems.items())


def _remark(key: Key, item: Any) -> str:
    """Returns the sentence about one of pydantic's errors, without the key at its start."""
    value, kind = item["input"], item["type"]
    expected = _EXPECTED_BY_KEY.get(dotted_name(key)) or _EXPECTED.get(kind)
    hint = ""
    match kind:
        case "missing":
            return " is missing; add it"
        case "extra_forbidden":
            nearest = _nearest(key)
            return ": unknown key" + (f"; did you mean {nearest}?" if nearest else "")
        case "literal_error":
            choices = item["ctx"]["expected"]
            expected = expected or choices
            hint = did_you_mean(str(value), re.findall(r"'([^']*)'", choices))
        case "value_error":
            return f": {item['ctx']['error']}, got {_shown(value)}"
        case "string_type" if isinstance(value, (int, float)):
            hint = " (put it in quotes)"
        case "bool_type" if str(value).lower() in {"yes", "no", "on", "off"}:
            hint = f" (YAML 1.2 reads {value} as text; write true or false)"
    if expected is None:
        return f": must be {item['msg'].removeprefix('Input should be ')}, got {_shown(value)}"
    return f": expected {expected}, got {_shown(value)}{hint}"


def _shown(value: object) -> str:
    """Returns a value in YAML style, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def conflicts(config: Config) -> list[Problem]:
    """Returns the problems of keys that are valid alone but not together."""
    return [(key, f"{dotted_name(key)}: {remark}") for key, remark in _conflicts(config)]


def _conflicts(config: Config) -> Iterator[Problem]:
    optim, train = config.optim, config.train
    yield from _optim_conflicts(("optim",), optim, optim.name)
    yield from _schedule_conflicts(("schedule",), config.schedule, train.epochs)
    for i, group in enumerate(optim.groups):
        place: Key = ("optim", "groups", i)
        yield from _optim_conflicts(place, group, group.name or optim.name)
        if group.schedule is not None:
            yield from _schedule_conflicts((*place, "schedule"), group.schedule, train.epochs)
        yield from _pattern_conflicts((*place, "parameters"), [group.parameters])
    if config.augment.resized_crop is not None and config.augment.crop_padding:
        yield ("augment", "crop_padding"), "augment.resized_crop also crops; remove one of them"
    model = config.model
    yield from _pattern_conflicts(("model", "freeze"), frozen_patterns(model))
    if model.unfreeze_epoch is not None and not frozen_patterns(model):
        yield ("model", "unfreeze_epoch"), "model.freeze names no parameters; set it, or remove this key"
    if model.weights is not None and model.name.startswith("timm:") and model.args.get("pretrained"):
        yield ("model", "weights"), "model.args.pretrained also gives initial weights; remove one of them"
    if config.augment.rand_augment is not None and config.augment.trivial_augment:
        yield ("augment", "rand_augment"), "augment.trivial_augment takes its place; remove one of them"
    if train.focal_gamma is not None and train.loss != "focal":
        yield (
            ("train", "focal_gamma"),
            "train.loss = cross_entropy does not use it; remove it, or choose focal",
        )
    if train.accumulate > train.batch_size:
        remark = f"{train.accumulate} is more than train.batch_size = {train.batch_size}; lower it"
        yield ("train", "accumulate"), remark


def _pattern_conflicts(place: Key, patterns: Iterable[str]) -> Iterator[Problem]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield place, f"not a regular expression: {error}"


def _optim_conflicts(place: Key, optim: OptimizerFields, name: str) -> Iterator[Problem]:
    for field, names in _OWNERS.items():
        if getattr(optim, field) is not None and name not in names:
            yield (*place, field), f"{name} does not use it; remove it"
    if optim.nesterov and optim.momentum == 0:
        yield (*place, "nesterov"), f"needs {dotted_name(place)}.momentum above 0"


def _schedule_conflicts(place: Key, schedule: ScheduleConfig, epochs: int) -> Iterator[Problem]:
    named = f"{dotted_name(place)}.name = {schedule.name}"
    warmup, end = schedule.warmup_epochs or 0, schedule.end_epoch
    if warmup > epochs:
        yield (*place, "warmup_epochs"), f"{warmup:g} is longer than train.epochs = {epochs}; shorten it"
    if end is not None and warmup > end:
        yield (*place, "end_epoch"), f"{end:g} is before the end of the warm-up, {warmup:g}; raise it"
    if end is not None and schedule.name in {"constant", "step"}:
        yield (*place, "end_epoch"), f"{named} does not use it; remove it"
    if schedule.name == "step" and not schedule.milestones:
        yield (*place, "milestones"), f"{named} needs it, for example [30, 40]"
    if schedule.name != "step" and schedule.milestones:
        yield (*place, "milestones"), f"{named} does not use it; remove it, or choose step"


def _known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Returns every dotted key, in order; the keys of list items have no number."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _known_keys(kind, f"{prefix}{name}.")
    return keys


def _is_key(key: Key) -> bool:
    return _without_numbers(key) in _known_keys() or key[:2] == ("model", "args")


def _without_numbers(key: Key) -> str:
    return dotted_name(tuple(part for part in key if isinstance(part, str)))


def _nearest(key: Key) -> str | None:
    """Returns the known dotted key closest to an unknown one, first in its section, then in any."""
    name, known = str(key[-1]), _known_keys()
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    parent = _without_numbers(key[:-1])
    siblings = [dotted for dotted in known if dotted.rpartition(".")[0] == parent]
    for candidates in (siblings, known):
        by_name = {dotted.rpartition(".")[2]: dotted for dotted in reversed(candidates)}
        if close := difflib.get_close_matches(name, by_name, 1):
            return by_name[close[0]]
    return None
