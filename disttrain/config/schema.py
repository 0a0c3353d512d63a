"""The sections of an experiment and their keys. Their docstrings are the descriptions in docs/config.md."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from disttrain.urls import public
from disttrain.user_code import is_target


class Role(Enum):
    """Whether a key may change on resume, and may differ between nodes; the default is EXPERIMENT."""

    EXPERIMENT = "experiment"
    """Determines the result, so a resumed run must have the same value."""
    RESUME = "may change on resume"
    """Is the same on all ranks, but may change on resume."""
    MACHINE = "machine"
    """May change on resume, and may differ between nodes."""


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
    """The data set, and how it is loaded."""

    name: Name
    """The packed data set: the name of a folder under the data root."""
    root: Annotated[Annotated[str, AfterValidator(public)] | None, Role.MACHINE] = None
    """Folder of the packed data sets, or its http(s)://, s3://, gs:// or hf:// address (docs/data.md). null
    means $DISTTRAIN_DATA, else the user's cache folder."""
    cache: Annotated[Literal["auto", "device", "host", "none"], Role.MACHINE] = "auto"
    """Where the decoded images are kept: on the device, or in host memory, shared by the ranks of a node.
    none: read and decode the shards in every epoch. auto: the first of these in which they fit. It only
    affects the speed."""
    image_size: PositiveInt | None = None
    """Side in pixels of the square that each image is cropped and resized to while it is decoded, such as
    224. Training takes the random crop of augment.resized_crop, evaluation the center. null: the images as
    they are stored, which must have one size."""
    decoded_side: PositiveInt | None = None
    """With data.image_size and augment.resized_crop: training images whose shorter side is larger are reduced
    to it before they are cropped, such as to 256. Then a node can keep decoded copies of them (data.cache).
    null: crops come from the full image."""
    pipeline: Annotated[str, AfterValidator(_target)] | None = None
    """Your own `package.module:function` that returns the stages which read, decode and batch the shards
    (docs/data.md). null: the usual stages. With your own stages, nothing is cached."""
    workers: Annotated[Annotated[int, Field(ge=0)] | None, Role.MACHINE] = None
    """With cache: none, the threads per process that read and decode shards ahead. 0: do it in the training
    thread. null: one per core of the process's share."""
    streams: PositiveInt = 16
    """Number of parts of an epoch that are read in parallel. Use at least as many as ranks, so that each rank
    reads only a few. It affects the order of the samples."""
    shuffle_buffer: PositiveInt = 65536
    """Samples, over all streams, from which the next one is drawn. A split of up to this many samples is
    shuffled in full within each stream. It affects the order of the samples."""
    on_error: Annotated[Literal["stop", "skip"], Role.RESUME] = "stop"
    """What to do with a bad shard or sample. stop: stop with an error that names it. skip: find all of them
    once and skip them on all ranks; the metrics have their number."""
    remainder: Literal["keep", "drop"] = "keep"
    """The samples that do not fill the last batch. keep: a smaller batch, averaged correctly. drop: leave
    them out."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """Which samples an epoch has. uniform: every sample once. balanced: as many samples, but the same number
    of each class, so that those of small classes repeat (docs/experiments.md)."""
    normalize: Literal["mean_std", "imagenet", "unit"] = "mean_std"
    """mean_std: subtract the data set's mean and divide by its standard deviation, per channel. imagenet: use
    ImageNet's mean and standard deviation, as torchvision's weights expect. unit: scale to 0..1."""


class RandAugmentConfig(_Section):
    """RandAugment (Cubuk et al. 2020)."""

    num_ops: PositiveInt = 2
    """Operations per image, one after the other."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of the operations."""


class ColorJitterConfig(_Section):
    """Random changes of the colours, in random order."""

    brightness: NonNegative = 0.0
    """The image is multiplied by a factor from 1 - this value, at least 0, to 1 + this value; 0 is off."""
    contrast: NonNegative = 0.0
    """The same for the distance from the mean gray value."""
    saturation: NonNegative = 0.0
    """The same for the distance from the image in gray."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Most by which the hue turns to each side, as a share of the colour circle; 0 is off."""


class AugmentConfig(_Section):
    """Augmentation of training images, batched on the device; off by default."""

    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Random crop of the original size, after reflection padding with this many pixels on each side."""
    resized_crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Random crop of at least this share of the image's area and an aspect ratio of 3:4 to 4:3, resized to
    the full size (Szegedy et al. 2014). 0.08 is usual for ImageNet; null is off. With data.image_size, the
    crop is cut out of the stored image."""
    flip: Literal["alternating"] | bool = False
    """Random horizontal flip. alternating: random in the first epoch, then flipped every other epoch, so that
    both versions of an image are seen equally often (Jordan 2024)."""
    trivial_augment: bool = False
    """TrivialAugment (Müller & Hutter 2021): one random operation of random strength on each image, as
    torchvision's TrivialAugmentWide."""
    rand_augment: RandAugmentConfig | None = None
    """RandAugment (Cubuk et al. 2020), as in torchvision: random operations of one strength on each image; {}
    takes the defaults. null is off."""
    color_jitter: ColorJitterConfig | None = None
    """Random changes of the colours in random order, as in torchvision, after the operations above; null is
    off."""
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a random rectangle is set to the mean, as in torchvision (Zhong et al. 2020), or to
    black with data.normalize = unit; 0 is off."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side in pixels of a random square that is set to the mean (DeVries & Taylor 2017), or to black with
    data.normalize = unit; 0 is off."""
    mixup: NonNegative = 0.0
    """Beta distribution parameter of mixup (Zhang et al. 2018); 0 is off."""
    cutmix: NonNegative = 0.0
    """Beta distribution parameter of cutmix (Yun et al. 2019); 0 is off. With both mixup and cutmix, each
    batch uses one of them at random."""


class ModelConfig(_Section):
    """The network."""

    name: str
    """A name from `disttrain models`, `torchvision:NAME`, `timm:NAME` (with pip install "disttrain[timm]"),
    or your own `package.module:Class`."""
    num_classes: PositiveInt | None = None
    """Number of outputs of the network; null means the number of classes of the data set."""
    args: dict[str, Any] = Field(default_factory=dict)
    """More keyword arguments for the network, such as `activation` for convnet4. For a network of timm,
    `pretrained: true` downloads its initial weights, once per node."""
    weights: str | None = None
    """Initial weights: a file of torch.save or safetensors, `torchvision:NAME` such as
    torchvision:IMAGENET1K_V2, `timm`, `timm:TAG`, or `hf-hub:OWNER/NAME[/FILE]` (docs/fine_tuning.md). Layers
    for another number of classes start at random. null: all weights start at random."""
    freeze: str | list[str] | None = None
    """Parameters that stay as they are: a regular expression for their full names, or several, such as
    `(?!fc\\.).*` for all but fc. Batch norms whose parameters are all frozen stay in evaluation mode."""
    unfreeze_epoch: Positive | None = None
    """Epochs after which all parameters are trained, such as 2 or 0.5. null: they stay frozen."""


Metric = Literal["accuracy", "loss", "macro_f1", "top5", "map"]


class StopEarlyConfig(_Section):
    """When a run ends before train.epochs."""

    metric: Metric
    """What has to improve in the evaluations; see eval.best."""
    patience_epochs: PositiveInt
    """Epochs without an improvement after which the run ends; counted at each evaluation."""
    min_delta: NonNegative = 0.0
    """An improvement is more than this: of the loss, or of a share of 0..1."""


class TrainConfig(_Section):
    """The training loop."""

    epochs: Annotated[PositiveInt, Role.RESUME]
    """Passes over the training split. On resume it may be raised, also for a finished run, but not lowered.
    The schedule then follows the longer run."""
    batch_size: PositiveInt
    """The GLOBAL batch of one optimizer step, for any number of processes."""
    stop_early: Annotated[StopEarlyConfig | None, Role.RESUME] = None
    """End the run after an evaluation, if a metric has not improved for some epochs (docs/experiments.md).
    null is off."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward and backward pass. auto: bf16 on a GPU that has it, fp16 on other GPUs, and
    fp32 on a CPU. `disttrain bench` shows what bf16 would gain on a CPU."""
    channels_last: Annotated[Literal["auto"] | bool, Role.RESUME] = "auto"
    """Keep images and filters in NHWC memory order. auto: true on a GPU; on a CPU, whatever is faster."""
    compile: Annotated[Literal["auto"] | bool, Role.RESUME] = "auto"
    """Compile the model with torch.compile. auto: only if it is faster, and the run is long enough for it to
    pay off."""
    cuda_graph: Annotated[Literal["auto"] | bool, Role.MACHINE] = "auto"
    """Replay a whole step as one CUDA graph, on a single GPU. auto: for networks of `disttrain models` that
    are not compiled. true: for any network; if a step waits for the GPU, it cannot be captured and the run
    fails."""
    loss: Literal["cross_entropy", "bce", "focal"] = "cross_entropy"
    """bce: binary cross entropy, for multi-label data (docs/multi_label.md). focal: the cross entropy of each
    sample or label times (1 - p) ** `focal_gamma`; p is the probability of its class (Lin et al. 2017)."""
    focal_gamma: NonNegative | None = None
    """For focal: how much less well-recognised samples count. null: 2."""
    class_weights: Literal["balanced"] | list[NonNegative] | None = None
    """Weight of each class in the training loss (docs/experiments.md; docs/multi_label.md for multi-label
    data). balanced: classes count the same, however many samples they have. A list has one number per class,
    in the order of the data set. null: samples count the same."""
    label_smoothing: Fraction = 0.0
    """Share of the target that is spread evenly over the classes, or yes and no (Szegedy et al. 2016)."""
    aux_weight: NonNegative | None = None
    """Weight of each auxiliary loss of a network that returns a tuple in training: the scores, then auxiliary
    scores. null: 0.4 for one, as of torchvision's inception_v3, and 0.3 for each of several, as of its
    googlenet (Szegedy et al. 2014)."""
    grad_clip: Positive | None = None
    """Clip the norm of the gradient to this value; null is off."""
    accumulate: Annotated[PositiveInt, Role.RESUME] = 1
    """Micro-batches per step in each process, to save memory. The global batch stays `batch_size`."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which is evaluated; null is off."""
    reproducible: bool = False
    """Give the same weights to the last bit on any number of processes up to `virtual_ranks`, also after any
    stops and resumes (docs/reproducibility.md). It costs some speed."""
    virtual_ranks: PositiveInt = 8
    """With `reproducible`: the number of parts of the global batch. Each part has its own batch-norm
    statistics, dropout masks and gradient; a process takes one or several parts."""
    trace_samples: Annotated[bool, Role.RESUME] = False
    """Write the sample ids of every step to trace/."""


class ScheduleConfig(_Section):
    """The learning rate over the run, as a function of the samples seen."""

    name: Literal["constant", "cosine", "linear", "step", "one_cycle"] = "constant"
    """Shape after the warm-up. one_cycle: up and down as in Smith & Topin 2018. linear with a warm-up: the
    triangle of Page 2018."""
    warmup_epochs: NonNegative | None = None
    """Epochs of linear warm-up. null: 30 % of the run for one_cycle, otherwise none."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end of cosine, linear and one_cycle, as a fraction of the peak."""
    end_epoch: Positive | None = None
    """Epoch from which cosine, linear and one_cycle stay at their final rate; null means the last."""
    milestones: list[Positive] = Field(default_factory=list)
    """step: epochs at which the learning rate is multiplied by gamma."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: the factor at each milestone."""


class OptimizerFields(_Section):
    """An optimizer. null means the optimizer's default; a setting that it does not use is an error."""

    name: Literal["sgd", "adam", "adamw", "muon"] | None = None
    """The optimizer."""
    lr: Positive | None = None
    """Peak learning rate."""
    momentum: Fraction | None = None
    """For sgd (default 0.9) and muon (default 0.95)."""
    nesterov: bool | None = None
    """For sgd (default false) and muon (default true)."""
    betas: tuple[Fraction, Fraction] | None = Field(default=None, strict=False)
    """For adam, adamw and the AdamW part of muon (default 0.9, 0.999)."""
    weight_decay: NonNegative | None = None
    """L2 penalty of sgd and adam; decoupled decay of adamw and muon."""
    adjust_lr: Literal["original", "match_rms_adamw"] | None = None
    """For muon (default match_rms_adamw): how the size of an update depends on the shape of the weight.
    match_rms_adamw: as large as AdamW's, so that both parts can use one learning rate (Liu et al. 2025).
    original: as in Jordan et al. 2024."""
    normalize_weights: bool | None = None
    """For muon (default false): before each step, scale every filter to the norm sqrt(outputs). For networks
    with a batch norm after each filter."""


class GroupConfig(OptimizerFields):
    """Parameters with their own optimizer settings; null means the value of the `optim` section.

    If `name` is another optimizer than in `optim`, null means that optimizer's default.
    """

    parameters: str
    """A regular expression for the full names of the group's parameters, such as `.*\\.bias`. A parameter
    belongs to the first group that matches."""
    schedule: ScheduleConfig | None = None
    """The learning rate over the run; null means the `schedule` section."""


class OptimConfig(OptimizerFields):
    """The optimizer. null means the optimizer's default; a setting that it does not use is an error."""

    name: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    """muon orthogonalises the updates of convolution and linear weights (Jordan et al. 2024). It trains the
    last layer, biases and norms with AdamW."""
    lr: Positive
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """L2 penalty of sgd and adam; decoupled decay of adamw and muon."""
    decay_norms_and_biases: bool = True
    """false: no weight decay for parameters of one dimension, which are norms and biases."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """The last layer has the full learning rate, and each layer before it this factor of the next one's, such
    as 0.75 (docs/fine_tuning.md). null is off."""
    groups: list[GroupConfig] = Field(default_factory=list)
    """Groups of parameters with their own settings."""


class EvalConfig(_Section):
    """Evaluation on the validation split."""

    every_epochs: Annotated[PositiveInt, Role.RESUME] = 1
    """Number of epochs between two evaluations; the last epoch is always evaluated."""
    tta: Annotated[Literal["none", "flip", "multi_view"], Role.RESUME] = "none"
    """Test-time augmentation. flip: the mean of the scores of the image and its mirror image. multi_view: six
    views, half the weight for these two and half for both shifted by a pixel to two corners. The records also
    have the result without augmentation."""
    crop_pct: Annotated[Annotated[float, Field(gt=0, le=1)], Role.RESUME] = 0.875
    """With data.image_size: side of the square in the center that is evaluated, as a share of the shorter
    side. 0.875 is the usual resize to 256 with a crop of 224."""
    tta_when: Annotated[Literal["always", "end"], Role.RESUME] = "always"
    """Use `tta` in every evaluation, or only in the one after the last epoch."""
    best: Metric = "accuracy"
    """Which evaluation is the best, and so which weights are kept as `best`. macro_f1: the mean F1 of the
    classes. top5: the share whose class is among the five best scores, for more than 5 classes. map: the mean
    average precision of the classes, for multi-label data."""


class CheckpointConfig(_Section):
    """When checkpoints are saved."""

    every_epochs: Annotated[PositiveInt, Role.RESUME] = 1
    """Number of epochs between two checkpoints; the last epoch always has one."""
    every_steps: Annotated[PositiveInt | None, Role.RESUME] = None
    """Number of steps between two additional checkpoints; null is off."""
    keep: Annotated[PositiveInt, Role.MACHINE] = 2
    """Checkpoints to keep in addition to the best one."""
    mirror: Annotated[str | None, Role.MACHINE] = None
    """An s3:// or gs:// address or a folder to which complete checkpoints are copied, and from which a run
    goes on whose run folder has none (docs/reliability.md). null is off."""


class MonitorConfig(_Section):
    """What is measured and shown."""

    log_every_steps: Annotated[PositiveInt, Role.RESUME] = 20
    """Steps between two lines of metrics.jsonl."""
    gpu_interval_s: Annotated[float, Field(ge=0.1), Role.MACHINE] = 1.0
    """Seconds between two readings of the GPUs."""
    stall_timeout_s: Annotated[float, Field(ge=1), Role.MACHINE] = 300.0
    """If a rank makes no progress for this many seconds, the run exits with 71. Set it longer than any single
    part of a step: a compilation, an evaluation batch, writing a checkpoint."""
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], Role.MACHINE] = Field(
        default_factory=list
    )
    """Experiment trackers that get every number of metrics.jsonl. Each needs the extra of its name: pip
    install "disttrain[tensorboard]"."""
    prometheus_dir: Annotated[str | None, Role.MACHINE] = None
    """Folder of node_exporter's textfile collector. The run keeps a file with the latest numbers there; null
    is off."""
    on_end: Annotated[str | None, Role.MACHINE] = None
    """Shell command that runs once when the run has finished, failed or stopped, with the outcome in its
    environment and on its standard input (docs/monitoring.md). null is off."""


class Config(_Section):
    """One experiment."""

    name: Name
    """Name of the experiment, and of the folder that its run folders are in."""
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


def frozen_patterns(model: ModelConfig) -> list[str]:
    """Returns the regular expressions of `model.freeze`."""
    return [model.freeze] if isinstance(model.freeze, str) else model.freeze or []


def role(key: str) -> Role:
    """Returns the role of a dotted key; for an unknown or former key, EXPERIMENT."""
    section: type[BaseModel] = Config
    for name in key.split("."):
        field = section.model_fields.get(name)
        if field is None:
            break
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, _Section)):
            return next((item for item in field.metadata if isinstance(item, Role)), Role.EXPERIMENT)
        section = field.annotation
    return Role.EXPERIMENT
