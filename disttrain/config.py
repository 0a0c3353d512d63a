"""The experiment: a typed schema, read from YAML with `key=value` overrides.

The YAML describes the experiment, never the machine. Everything is checked here, before anything
starts: unknown keys, wrong types and impossible combinations each give one line that names the place
and the remedy. This module imports neither torch nor, but for errors and YAML, anything of the package.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from disttrain.errors import UsageError
from disttrain.user_code import is_target
from disttrain.yaml12 import Key, dotted_name, read_yaml, write_yaml


class Role(Enum):
    """What a key says something about; a field without one is part of the experiment."""

    EXPERIMENT = "experiment"
    """It decides the result: a run goes on with the same value."""
    RESUME = "may change on resume"
    """It is the same on all ranks, but may be another one when a run goes on."""
    MACHINE = "machine"
    """It may change and may differ from node to node."""


Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _target(name: str) -> str:
    if not is_target(name):
        raise ValueError("expected package.module:function, such as my_stages:pipeline")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(_Section):
    """Which data set, and how it is served."""

    name: Name
    """A packed data set: the name of a folder under the data root."""
    root: Annotated[str | None, Role.MACHINE] = None
    """Folder of the packed data sets; null means $DISTTRAIN_DATA, else the user's cache folder."""
    cache: Annotated[Literal["auto", "device", "host", "none"], Role.MACHINE] = "auto"
    """Where the decoded images live: on the device, in host memory (shared by the ranks of a node), or none:
    the shards are read and decoded in every epoch. auto: the first of these that they fit into. The choice
    changes the speed and nothing else."""
    pipeline: Annotated[str, AfterValidator(_target)] | None = None
    """`package.module:function` of your own that arranges the stages which read, decode and batch the shards
    (docs/data.md); null leaves them as they are. With it nothing is cached."""
    workers: Annotated[Annotated[int, Field(ge=0)] | None, Role.MACHINE] = None
    """Threads per process that read and decode shards ahead, with cache: none; 0 does it in the training
    thread; null: one per core of the process's share."""
    streams: PositiveInt = 16
    """Parts of an epoch that are read side by side. Each rank reads few of them if there are at least as many
    as ranks. Part of the order of the samples."""
    shuffle_buffer: PositiveInt = 65536
    """Samples, over all streams, among which the order is random; a split of up to so many is shuffled in
    full within each stream. Part of the order of the samples."""
    on_error: Annotated[Literal["stop", "skip"], Role.RESUME] = "stop"
    """A shard or sample that cannot be used: stop with an error that names it, or look for all of them once
    and leave them out on all ranks, with their number in the metrics."""
    remainder: Literal["keep", "drop"] = "keep"
    """The samples that do not fill a last batch: keep (a smaller batch, averaged correctly) or drop."""
    normalize: Literal["mean_std", "imagenet", "unit"] = "mean_std"
    """mean_std: subtract the data set's mean and divide by its standard deviation per channel; imagenet: with
    those of ImageNet, as torchvision's weights expect; unit: scale to 0..1."""


class AugmentConfig(_Section):
    """Augmentation of training images, batched on the device; off by default."""

    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Random crop of the original size after reflecting this many pixels at each border."""
    resized_crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Random part of the image of at least this share of its area and an aspect ratio of 3:4 to 4:3, enlarged
    to the full size (Szegedy et al. 2014); 0.08 is usual for ImageNet, null is off."""
    flip: Literal["alternating"] | bool = False
    """Random horizontal flip. alternating: at random in the first epoch, then every other epoch, so that each
    image is seen from both sides equally often (Jordan 2024)."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side in pixels of a random square set to the mean (DeVries & Taylor 2017), or to black with
    data.normalize = unit; 0 is off."""
    mixup: NonNegative = 0.0
    """Beta distribution parameter of mixup (Zhang et al. 2018); 0 is off."""
    cutmix: NonNegative = 0.0
    """Beta distribution parameter of cutmix (Yun et al. 2019); 0 is off. With mixup, one of both at random
    for each batch."""


class ModelConfig(_Section):
    """The network."""

    name: str
    """A name from `disttrain models`, `torchvision:NAME` or `package.module:Class` of your own."""
    num_classes: PositiveInt | None = None
    """Outputs of the network; null means the classes of the data set."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments for the network, such as `activation` for convnet4."""
    weights: str | None = None
    """File with weights to begin with: a state dict of torch.save, such as torchvision's, or safetensors.
    Layers for another number of classes begin at random; null begins at random everywhere."""


class TrainConfig(_Section):
    """The training loop."""

    epochs: Annotated[PositiveInt, Role.RESUME]
    """Passes over the training split. On resume it may be raised, also that of a finished run, and not
    lowered; from there on the schedule is that of the longer run."""
    batch_size: PositiveInt
    """The GLOBAL batch of one optimizer step, whatever the number of processes."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward and backward pass. auto: bf16 where the GPU has it, else fp16; fp32 on a CPU,
    where `disttrain bench` shows what bf16 would gain."""
    channels_last: Annotated[Literal["auto"] | bool, Role.RESUME] = "auto"
    """Keep images and filters in NHWC memory order. auto: yes on a GPU, what is faster on a CPU."""
    compile: Annotated[Literal["auto"] | bool, Role.RESUME] = "auto"
    """torch.compile the model. auto: if the run is long enough to repay it and it proves faster."""
    cuda_graph: Annotated[Literal["auto"] | bool, Role.MACHINE] = "auto"
    """Replay a whole step as one CUDA graph, on a single GPU. auto: for our own networks where they are not
    compiled. true: for any other too; one that waits for the GPU in a step cannot be recorded, which ends the
    run."""
    label_smoothing: Fraction = 0.0
    """Share of the target spread evenly over the classes (Szegedy et al. 2016)."""
    grad_clip: Positive | None = None
    """Largest norm of the gradient; null is off."""
    accumulate: Annotated[PositiveInt, Role.RESUME] = 1
    """Parts in which each process works through its share of the batch, to save memory. The global batch
    stays `batch_size`."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, used for evaluation; null is off."""
    reproducible: bool = False
    """Use deterministic kernels only: the same run on the same number of processes gives the same bits."""
    trace_samples: Annotated[bool, Role.RESUME] = False
    """Write the ids of the samples of every step to trace/."""


class ScheduleConfig(_Section):
    """The learning rate over the run, as a function of the samples seen."""

    name: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "constant"
    """Shape after the warm-up. one_cycle: up and down as in Smith & Topin 2018; linear with a warm-up is the
    triangle of Page 2018."""
    warmup_epochs: NonNegative | None = None
    """Linear rise at the start; null means none, or 30 % of the run for one_cycle."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end of cosine, linear and one_cycle, as a share of the peak."""
    end_epoch: Positive | None = None
    """Epoch at which cosine, linear and one_cycle reach their end and stay there; null means the last."""
    milestones: list[Positive] = Field(default_factory=list)
    """step: epochs at which the rate is multiplied by gamma."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: the factor at each milestone."""


class GroupConfig(_Section):
    """Parameters that are trained in another way; a null takes what the `optim` section has.

    Where `name` is another optimizer than there, its settings are that optimizer's own defaults.
    """

    parameters: str
    """A regular expression that matches the whole name of each parameter of the group, such as
    `.*\\.bias`; the first group that matches has the parameter."""
    name: Literal["sgd", "adam", "adamw", "muon"] | None = None
    """The optimizer."""
    lr: Positive | None = None
    """Peak learning rate."""
    momentum: Fraction | None = None
    """sgd and muon."""
    nesterov: bool | None = None
    """sgd and muon."""
    betas: tuple[Fraction, Fraction] | None = Field(default=None, strict=False)
    """adam, adamw and the AdamW part of muon."""
    weight_decay: NonNegative | None = None
    """As in `optim`."""
    adjust_lr: Literal["original", "match_rms_adamw"] | None = None
    """muon, as in `optim`."""
    normalize_weights: bool | None = None
    """muon, as in `optim`."""
    schedule: ScheduleConfig | None = None
    """The learning rate over the run; null means the `schedule` section."""


class OptimConfig(_Section):
    """The optimizer. A null takes the optimizer's own default; a setting it does not have is an error."""

    name: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    """muon orthogonalises the updates of convolution and linear weights (Jordan et al. 2024); the last
    layer, biases and norms take AdamW steps."""
    lr: Positive
    """Peak learning rate."""
    momentum: Fraction | None = None
    """sgd (default 0.9) and muon (0.95)."""
    nesterov: bool | None = None
    """sgd (default false) and muon (true)."""
    betas: tuple[Fraction, Fraction] | None = Field(default=None, strict=False)
    """adam, adamw and the AdamW part of muon (default 0.9, 0.999)."""
    weight_decay: NonNegative = 0.0
    """L2 penalty of sgd and adam; decoupled decay of adamw and muon."""
    adjust_lr: Literal["original", "match_rms_adamw"] | None = None
    """muon (default match_rms_adamw): how the size of an update depends on the shape of the weight.
    match_rms_adamw: as large as AdamW's, so that both parts share a learning rate (Liu et al. 2025);
    original: as in Jordan et al. 2024."""
    normalize_weights: bool | None = None
    """muon (default false): before each step, scale every filter to the norm sqrt(outputs), for networks in
    which a batch norm follows each of them."""
    groups: list[GroupConfig] = Field(default_factory=list)
    """Parameters that are trained in another way."""


class EvalConfig(_Section):
    """Evaluation on the validation split."""

    every_epochs: Annotated[PositiveInt, Role.RESUME] = 1
    """Evaluate after every so many epochs, and always after the last."""
    tta: Annotated[Literal["none", "flip", "multi_view"], Role.RESUME] = "none"
    """Test-time augmentation: the mean of the scores of the image and its mirror image; multi_view: half of
    that, and half of both shifted by a pixel to either corner (six views). The records have the result
    without it too."""
    tta_when: Annotated[Literal["always", "end"], Role.RESUME] = "always"
    """In every evaluation, or in the one after the last epoch."""


class CheckpointConfig(_Section):
    """When the run is saved."""

    every_epochs: Annotated[PositiveInt, Role.RESUME] = 1
    """Save after every so many epochs, and always after the last."""
    every_steps: Annotated[PositiveInt | None, Role.RESUME] = None
    """Also save after every so many steps."""
    keep: Annotated[PositiveInt, Role.MACHINE] = 2
    """Checkpoints kept besides the best one."""


class MonitorConfig(_Section):
    """What is measured and shown."""

    log_every_steps: Annotated[PositiveInt, Role.RESUME] = 20
    """Steps between two lines of metrics.jsonl."""
    gpu_interval_s: Annotated[float, Field(ge=0.1), Role.MACHINE] = 1.0
    """Seconds between two readings of the GPUs."""
    stall_timeout_s: Annotated[float, Field(ge=1), Role.MACHINE] = 300.0
    """Seconds without progress after which a rank is taken for hung and the run ends with 71. Longer than the
    longest single part of a step: a compilation, a batch of evaluation, the writing of a checkpoint."""
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], Role.MACHINE] = Field(
        default_factory=list
    )
    """Experiment trackers that get every number of metrics.jsonl, each of an extra of its name:
    pip install "disttrain[tensorboard]"."""
    prometheus_dir: Annotated[str | None, Role.MACHINE] = None
    """Folder of node_exporter's textfile collector, for a file with the last numbers while the run lasts;
    null is off."""


class Config(_Section):
    """One experiment."""

    name: Name
    """Name of the experiment; the run folder is made under it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of the samples and the augmentation."""
    data: DataConfig
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)


def role(key: str) -> Role:
    """Returns what a dotted key says something about; a key that there is not (any more): the experiment."""
    section: type[BaseModel] = Config
    for name in key.split("."):
        field = section.model_fields.get(name)
        if field is None:
            break
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, _Section)):
            return next((item for item in field.metadata if isinstance(item, Role)), Role.EXPERIMENT)
        section = field.annotation
    return Role.EXPERIMENT


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides and checks the result.

    Args:
        path: the YAML file.
        overrides: Hydra-style assignments; values are read as YAML.

    Raises:
        UsageError: the file or an override is wrong; the message names file and line, or the override.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config file{_similar_file(path)}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    tree, lines = read_yaml(text, str(path), numbered=True)
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected the sections of an experiment (data:, model:, train:, ...)")
    where = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        _apply_override(tree, where, override)
    return _check(tree, where, str(path))


def dump_config(config: Config) -> str:
    """Returns the resolved config as YAML; reading it again gives an equal `Config`."""
    return write_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of the config, for editors."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "disttrain config"}


def settings(config: Config) -> dict[str, Any]:
    """Returns every setting by its dotted key, such as optim.lr."""
    return flatten(config.model_dump(mode="json"))


def differences(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[str]:
    """Returns one `key: old -> new` line for each key in which two configs, or documents, differ."""
    before, after = (settings(item) if isinstance(item, Config) else flatten(item) for item in (old, new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def _apply_override(tree: dict[str, Any], where: dict[Key, str], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"{override!r} is not an override; write key=value, for example optim.lr=0.1")
    value, _ = read_yaml(text, f"override {override!r}", numbered=False)
    section = tree
    for depth, key in enumerate(keys[:-1]):
        child = section.get(key)
        if child is None:
            child = section[key] = {}
            where.setdefault((*keys[: depth + 1],), f"override {override!r}")
        if not isinstance(child, dict):
            dotted = dotted_name(tuple(keys[: depth + 1]))
            raise UsageError(f"override {override!r}: {dotted} is a value, not a section")
        section = child
    old = section.get(keys[-1])
    if isinstance(old, dict) and not isinstance(value, dict):
        raise UsageError(
            f"override {override!r}: {name} is a section; set one of its keys, such as {name}."
            f"{next(iter(old), 'name')}=..."
        )
    section[keys[-1]] = value
    for place in [place for place in where if place[: len(keys)] == tuple(keys)]:
        del where[place]  # what the file held below this key is gone
    where[tuple(keys)] = f"override {override!r}"


# --- Checking ---------------------------------------------------------------------------------------

_OTHER_NAMES = {  # what other tools call it
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
    "gradient_accumulation_steps": "train.accumulate",
    "max_grad_norm": "train.grad_clip",
    "ema_decay": "train.ema",
    "training": "train",
    "evaluation": "eval",
}


class _Problem(NamedTuple):
    key: Key
    message: str


def _check(tree: dict[str, Any], where: Mapping[Key, str], source: str) -> Config:
    try:
        config = Config.model_validate(tree)
    except pydantic.ValidationError as error:
        problems = _problems(error)
    else:
        problems = _conflicts(config)
        if not problems:
            return config
    text = [f"{_place(problem.key, where, source)}: {problem.message}" for problem in problems]
    raise UsageError("\n".join(dict.fromkeys(text)))


def _place(key: Key, where: Mapping[Key, str], source: str) -> str:
    for end in range(len(key), 0, -1):
        if key[:end] in where:
            return where[key[:end]]
    return source


def _problems(error: pydantic.ValidationError) -> list[_Problem]:
    problems = {}
    for item in error.errors():
        key = item["loc"]
        if item["type"] != "extra_forbidden":  # a union appends its branch ("literal['auto']") to the place
            key = tuple(part for i, part in enumerate(key) if isinstance(part, int) or _is_key(key[: i + 1]))
        problems[key] = _Problem(key, _message(key, item))
    return list(problems.values())


def _message(key: Key, item: Any) -> str:
    dotted = dotted_name(key)
    value = item["input"]
    expected = _EXPECTED_BY_KEY.get(dotted) or _EXPECTED.get(item["type"])
    match item["type"]:
        case "missing":
            return f"{dotted} is missing; add it"
        case "extra_forbidden":
            nearest = _nearest(key)
            return f"{dotted}: unknown key" + (f"; did you mean {nearest}?" if nearest else "")
        case "model_type" | "dict_type":
            return f"{dotted}: expected a section (key: value), got {_shown(value)}"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
            close = difflib.get_close_matches(str(value), choices, 1)
            text = f"{dotted}: expected {expected or item['ctx']['expected']}, got {_shown(value)}"
            return text + (f"; did you mean {close[0]}?" if close else "")
        case "string_pattern_mismatch":
            return (
                f"{dotted}: expected letters, digits, '.', '_' and '-', "
                f"with a letter or digit first, got {_shown(value)}"
            )
    if expected is None:
        return f"{dotted}: must be {item['msg'].removeprefix('Input should be ')}, got {_shown(value)}"
    text = f"{dotted}: expected {expected}, got {_shown(value)}"
    if item["type"] == "string_type" and isinstance(value, (int, float)):
        text += " (put it in quotes)"
    if item["type"] == "bool_type" and str(value).lower() in {"yes", "no", "on", "off"}:
        text += f" (YAML 1.2 reads {value} as text; write true or false)"
    return text


def _shown(value: object) -> str:
    """Returns a value as YAML has it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
}
_EXPECTED_BY_KEY = {
    "train.compile": "auto, true or false",
    "train.channels_last": "auto, true or false",
    "train.cuda_graph": "auto, true or false",
    "augment.flip": "true, false or alternating",
    "optim.betas": "two numbers, such as [0.9, 0.999]",
}


def _conflicts(config: Config) -> list[_Problem]:
    """Returns what each key alone allows but the keys together do not."""
    problems = []
    optim, schedule, train = config.optim, config.schedule, config.train
    problems += _optim_conflicts(("optim",), optim, optim.name)
    problems += _schedule_conflicts(("schedule",), schedule, train.epochs)
    for i, group in enumerate(optim.groups):
        place: Key = ("optim", "groups", i)
        problems += _optim_conflicts(place, group, group.name or optim.name)
        if group.schedule is not None:
            problems += _schedule_conflicts((*place, "schedule"), group.schedule, train.epochs)
        try:
            re.compile(group.parameters)
        except re.error as error:
            text = f"{dotted_name(place)}.parameters: not a regular expression: {error}"
            problems.append(_Problem((*place, "parameters"), text))
    if config.augment.resized_crop is not None and config.augment.crop_padding:
        text = "augment.crop_padding: resized_crop crops already; remove one of both"
        problems.append(_Problem(("augment", "crop_padding"), text))
    if train.accumulate > train.batch_size:
        text = f"train.accumulate: {train.accumulate} parts of a batch of {train.batch_size}; make it smaller"
        problems.append(_Problem(("train", "accumulate"), text))
    return problems


def _optim_conflicts(place: Key, optim: OptimConfig | GroupConfig, name: str) -> list[_Problem]:
    problems = []
    for field, names in _OWNERS.items():
        if getattr(optim, field) is not None and name not in names:
            text = f"{dotted_name(place)}.{field}: {name} has none; remove it"
            problems.append(_Problem((*place, field), text))
    if optim.nesterov and optim.momentum == 0:
        text = f"{dotted_name(place)}.nesterov: needs {dotted_name(place)}.momentum above 0"
        problems.append(_Problem((*place, "nesterov"), text))
    return problems


_OWNERS = {
    "momentum": ("sgd", "muon"),
    "nesterov": ("sgd", "muon"),
    "betas": ("adam", "adamw", "muon"),
    "adjust_lr": ("muon",),
    "normalize_weights": ("muon",),
}


def _schedule_conflicts(place: Key, schedule: ScheduleConfig, epochs: int) -> list[_Problem]:
    dotted, problems = dotted_name(place), []
    warmup, end = schedule.warmup_epochs or 0, schedule.end_epoch
    if warmup > epochs:
        text = f"{dotted}.warmup_epochs: {warmup:g} is longer than train.epochs = {epochs}; shorten it"
        problems.append(_Problem((*place, "warmup_epochs"), text))
    if end is not None and warmup > end:
        text = f"{dotted}.end_epoch: {end:g} is before the end of the warm-up, {warmup:g}; move it"
        problems.append(_Problem((*place, "end_epoch"), text))
    if end is not None and schedule.name in {"constant", "step"}:
        text = f"{dotted}.end_epoch: {dotted}.name = {schedule.name} has none; remove it"
        problems.append(_Problem((*place, "end_epoch"), text))
    if schedule.name == "step" and not schedule.milestones:
        text = f"{dotted}.milestones: needed by {dotted}.name = step, for example [30, 40]"
        problems.append(_Problem((*place, "milestones"), text))
    if schedule.name != "step" and schedule.milestones:
        text = f"{dotted}.milestones: {dotted}.name = {schedule.name} has none; remove it or choose step"
        problems.append(_Problem((*place, "milestones"), text))
    return problems


def _known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Returns every dotted key, in order; those of the items of a list stand for all of them."""
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
    known, name = _known_keys(), str(key[-1])
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    parent = _without_numbers(key[:-1])
    siblings = [dotted for dotted in known if dotted.rpartition(".")[0] == parent]
    for candidates in (siblings, list(known)):
        by_name = {dotted.rpartition(".")[2]: dotted for dotted in reversed(candidates)}
        close = difflib.get_close_matches(name, by_name, 1, cutoff=0.6)
        if close:
            return by_name[close[0]]
    return None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested sections by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _similar_file(path: Path) -> str:
    try:
        names = [file.name for file in path.parent.iterdir() if file.suffix in {".yaml", ".yml"}]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1) or difflib.get_close_matches(
        f"{path.stem}.yaml", names, 1
    )
    return f"; did you mean {path.parent / close[0]}?" if close else ""
