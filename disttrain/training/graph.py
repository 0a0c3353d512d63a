"""A whole step as one CUDA graph: the host launches one graph instead of some hundred kernels.

A GPU computes a step of a small network faster than the host can launch its kernels. A step that is captured
once and replayed takes only the time of its kernels. The images are loaded and augmented before, outside the
graph.
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

log = logging.getLogger("disttrain")

_WARM_UP_STEPS = 3  # before the capture, to load libraries, choose kernels and allocate memory

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes images float32 [B, C, H, W] and labels (`Batch`); returns loss float32 [] and scores [B, classes]."""


def graph_choice(config: Config, device: torch.device, world_size: int, settings: Settings) -> Choice:
    """Returns whether to replay the steps of a run as a graph, "true" or "false", and the reason."""
    if config.train.cuda_graph is False:
        return Choice("false", "train.cuda_graph")
    if obstacle := graph_obstacle(config, device, world_size, settings.precision):
        return Choice("false", obstacle)
    if config.train.cuda_graph is True:
        return Choice("true", "train.cuda_graph")
    if config.model.name not in CATALOG:
        return Choice("false", "your own network; train.cuda_graph=true tries it")
    if settings.compiled:
        return Choice("false", "compiled; train.cuda_graph=true does both")
    return Choice("true", "a single GPU")


def graph_obstacle(config: Config, device: torch.device, world_size: int, precision: str) -> str | None:
    """Returns why a graph is impossible, whatever `train.cuda_graph` is, or None if it is possible."""
    obstacles = {
        "there is no GPU": device.type != "cuda",
        "several ranks reduce their gradients": world_size > 1,
        "train.reproducible": config.train.reproducible,
        "train.accumulate": config.train.accumulate > 1,
        "fp16 scales the loss": precision == "fp16",
        "mixed images differ from step to step": config.augment.mixup > 0 or config.augment.cutmix > 0,
    }
    return next((name for name, holds in obstacles.items() if holds), None)


class StepGraph:
    """Runs steps on batches of one shape: the first few normally, the others as a CUDA graph.

    Python code of a step runs only during the capture, not in a replay. Every step reads the current learning
    rates. The device's random numbers are the same as without a graph.

    Args:
        optimizer: its learning rates are used.
        device: a GPU.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._groups = optimizer.param_groups
        self._device = device
        self._rates = [torch.zeros((), device=device) for _ in self._groups]
        self._stream = torch.cuda.Stream(device)
        self._warm_up_left = _WARM_UP_STEPS
        self._usable = True
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Step, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Runs `step` on images and labels; `step` must be the same in every call.

        Returns:
            The loss and the scores of `step`, detached.
        """
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])
        if self._graph is None and self._usable and self._warm_up_left == 0:
            self._capture(step, images, labels)
        if self._graph is None:
            self._warm_up_left = max(0, self._warm_up_left - 1)
            with self._rates_on_device(), self._on_capture_stream():
                loss, scores = step(images, labels)
            return loss.detach(), scores.detach()
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss.clone(), self._scores.clone()

    @property
    def recorded(self) -> bool:
        """Whether the steps are replayed now."""
        return self._graph is not None

    def _capture(self, step: Step, images: Tensor, labels: Tensor) -> None:
        """Captures a step if there is enough memory.

        Raises:
            UsageError: the step cannot be captured.
        """
        self._usable = self._fits()
        if not self._usable:
            log.info("no CUDA graph: not enough memory for a second set of activations")
            return
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile, for example to write a checkpoint.
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        try:
            with self._rates_on_device(capturable=True), recording:
                loss, scores = step(self._images, self._labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise UsageError(
                f"a step of this network cannot be captured as a CUDA graph ({why}); "
                "set train.cuda_graph=false"
            ) from error
        self._graph, self._loss, self._scores = graph, loss.detach(), scores.detach()

    def _fits(self) -> bool:
        """Returns whether there is enough memory for a second set of activations."""
        needed = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return 2 * needed < free + cached

    @contextlib.contextmanager
    def _rates_on_device(self, *, capturable: bool = False) -> Iterator[None]:
        """Keeps the optimizer's learning rates on the device, where they can change between replays."""
        before = [dict(group) for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:  # Adam requires the flag, although its fused kernels are capturable
                group["capturable"] = capturable
        try:
            yield
        finally:
            for group, old in zip(self._groups, before, strict=True):
                group.update(old)

    @contextlib.contextmanager
    def _on_capture_stream(self) -> Iterator[None]:
        """Runs on the capture's stream, so that its memory and libraries are ready for the capture."""
        default = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(default)
        with torch.cuda.stream(self._stream):
            yield
        default.wait_stream(self._stream)
