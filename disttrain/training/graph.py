"""A whole step as one CUDA graph: the host hands out one piece of work in place of some hundred kernels.

A GPU computes a step of a small network faster than the host can ask for its kernels. Recorded once and
replayed, the step takes the time of its kernels.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from disttrain.config import Config
from disttrain.errors import UsageError
from disttrain.models import CATALOG
from disttrain.training.autotune import Choice, Settings
from disttrain.training.optim import inner_groups

log = logging.getLogger("disttrain")

_WARM_UP_STEPS = 3  # torch wants some before a capture: libraries are loaded, kernels and memory chosen

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes images float32 [B, C, H, W] and labels int64 [B], returns loss float32 [] and scores [B, classes]."""


def graph_choice(config: Config, device: torch.device, world_size: int, settings: Settings) -> Choice:
    """Returns whether the steps of a run are replayed as a graph, "true" or "false", and why."""
    if config.train.cuda_graph is False:
        return Choice("false", "train.cuda_graph")
    if obstacle := graph_obstacle(config, device, world_size, settings.precision):
        return Choice("false", obstacle)
    if config.train.cuda_graph is True:
        return Choice("true", "train.cuda_graph")
    if config.model.name not in CATALOG:
        return Choice("false", "not one of our networks; train.cuda_graph=true tries it")
    if settings.compiled:
        return Choice("false", "compiled; train.cuda_graph=true does both")
    return Choice("true", "a single GPU")


def graph_obstacle(config: Config, device: torch.device, world_size: int, precision: str) -> str | None:
    """Returns why no graph is possible, whatever `train.cuda_graph` says, or None."""
    obstacles = {
        "there is no GPU": device.type != "cuda",
        "several ranks reduce their gradients": world_size > 1,
        "train.accumulate": config.train.accumulate > 1,
        "fp16 scales the loss": precision == "fp16",
        "mixed images differ from step to step": config.augment.mixup > 0 or config.augment.cutmix > 0,
    }
    return next((name for name, holds in obstacles.items() if holds), None)


class StepGraph:
    """Takes steps on batches of one shape: the first few as they are, the others as a CUDA graph.

    What a step does on the host happens while it is recorded and not again; the learning rates are read anew
    in every step. The random numbers of the device are those of its generator, as without a graph.

    Args:
        optimizer: whose rates the steps use.
        device: a GPU.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._groups = optimizer.param_groups
        self._inner_groups = inner_groups(optimizer)
        self._device = device
        self._rates = [torch.zeros((), device=device) for _ in self._groups]
        self._stream = torch.cuda.Stream(device)
        self._warm_up_left = _WARM_UP_STEPS
        self._usable = True
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Step, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a step; the arguments are those of `step`, which is the same in every call.

        Returns:
            The loss and the scores of `step`, detached.
        """
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])
        if self._graph is None and self._usable and self._warm_up_left == 0:
            self._capture(step, images, labels)
        if self._graph is None:
            self._warm_up_left = max(0, self._warm_up_left - 1)
            with self._rates_on_device(), self._apart():
                loss, scores = step(images, labels)
            return loss.detach(), scores.detach()
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss.clone(), self._scores.clone()

    @property
    def recorded(self) -> bool:
        """Whether the steps are replayed by now."""
        return self._graph is not None

    def _capture(self, step: Step, images: Tensor, labels: Tensor) -> None:
        """Records a step, if there is memory for it.

        Raises:
            UsageError: it does what cannot be recorded.
        """
        self._usable = self._fits()
        if not self._usable:
            log.info("no CUDA graph: there is no memory for a second set of activations")
            return
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask for memory meanwhile: they write a checkpoint, say.
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        try:
            with self._rates_on_device(capturable=True), recording:
                loss, scores = step(self._images, self._labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise UsageError(
                f"a step of this network cannot be recorded as a CUDA graph ({why}); "
                "set train.cuda_graph=false"
            ) from error
        self._graph, self._loss, self._scores = graph, loss.detach(), scores.detach()

    def _fits(self) -> bool:
        """Tells whether there is memory for a second set of activations, those of the graph."""
        needed = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return 2 * needed < free + cached

    @contextlib.contextmanager
    def _rates_on_device(self, *, capturable: bool = False) -> Iterator[None]:
        """Lets the optimizer read its rates on the device, where they can change between replays."""
        groups = [*self._groups, *self._inner_groups]
        before = [dict(group) for group in groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate
        for group in groups:
            if "capturable" in group:  # Adam asks for this word; its fused kernels are so in any case
                group["capturable"] = capturable
        try:
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Works on the stream of the capture, whose memory and libraries are then ready."""
        default = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(default)
        with torch.cuda.stream(self._stream):
            yield
        default.wait_stream(self._stream)
