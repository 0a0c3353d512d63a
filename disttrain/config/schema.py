"""The sections of an experiment and their keys; the docstrings are what docs/config.md says of each."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from disttrain.user_code import is_target


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


class OptimizerFields(_Section):
    """An optimizer. A null takes its own default; a setting it does not have is an error."""

    name: Literal["sgd", "adam", "adamw", "muon"] | None = None
    """The optimizer."""
    lr: Positive | None = None
    """Peak learning rate."""
    momentum: Fraction | None = None
    """sgd (default 0.9) and muon (0.95)."""
    nesterov: bool | None = None
    """sgd (default false) and muon (true)."""
    betas: tuple[Fraction, Fraction] | None = Field(default=None, strict=False)
    """adam, adamw and the AdamW part of muon (default 0.9, 0.999)."""
    weight_decay: NonNegative | None = None
    """L2 penalty of sgd and adam; decoupled decay of adamw and muon."""
    adjust_lr: Literal["original", "match_rms_adamw"] | None = None
    """muon (default match_rms_adamw): how the size of an update depends on the shape of the weight.
    match_rms_adamw: as large as AdamW's, so that both parts share a learning rate (Liu et al. 2025);
    original: as in Jordan et al. 2024."""
    normalize_weights: bool | None = None
    """muon (default false): before each step, scale every filter to the norm sqrt(outputs), for networks in
    which a batch norm follows each of them."""


class GroupConfig(OptimizerFields):
    """Parameters that are trained in another way; a null takes what the `optim` section has.

    Where `name` is another optimizer than there, its settings are that optimizer's own defaults.
    """

    parameters: str
    """A regular expression that matches the whole name of each parameter of the group, such as
    `.*\\.bias`; the first group that matches has the parameter."""
    schedule: ScheduleConfig | None = None
    """The learning rate over the run; null means the `schedule` section."""


class OptimConfig(OptimizerFields):
    """The optimizer. A null takes the optimizer's own default; a setting it does not have is an error."""

    name: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    """muon orthogonalises the updates of convolution and linear weights (Jordan et al. 2024); the last
    layer, biases and norms take AdamW steps."""
    lr: Positive
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """L2 penalty of sgd and adam; decoupled decay of adamw and muon."""
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
