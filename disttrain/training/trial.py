"""Tries a model in training mode before the first step, on as few images as a rank may get in an epoch.

What training does to a model would otherwise be known in step 1 or in the last batch: batch norm of a single
value, an output that is not a tensor, parameters without a gradient.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain import counter_rng
from disttrain.config import Config, TrainConfig
from disttrain.data.epoch_plan import Plan, smallest_micro_batch
from disttrain.errors import UsageError, error_text
from disttrain.models import is_of_a_library
from disttrain.models.pretrained import some_names
from disttrain.preflight import split_batch
from disttrain.shards.index import Index
from disttrain.training.group import out_of_memory
from disttrain.training.loss import all_scores
from disttrain.training.rng import generator_states, seed_all
from disttrain.user_code import is_target

log = logging.getLogger("disttrain")

_FEW = 2  # images of a pass where a rank never gets fewer: a larger batch takes longer and rarely shows more
_DRAWS = 4  # passes of a model that draws random numbers on the host, and may skip layers by them
_TRIAL = 27  # the stream of random numbers that seeds the passes
_NEIGHBOURS = 64  # batch sizes to try on each side


class _Failed(NamedTuple):
    """Why a pass failed: the error, and the innermost layer in which it was raised, if it was in one."""

    error: str
    layer: str | None = None


def try_training(config: Config, model: nn.Module, index: Index, plan: Plan, world_size: int) -> list[str]:
    """Takes a training pass with a copy of a model. Every rank calls this.

    The model does not change. The random number generators do: see `preserve_rng_state`.

    Args:
        config: the experiment.
        model: on its device, neither compiled nor wrapped.
        index: its data set.
        plan: the batches of an epoch.
        world_size: number of ranks.

    Returns:
        The names of trainable parameters that got no gradient. With one rank, perhaps not all that a layer
        skipped at random has.

    Raises:
        UsageError: the model cannot be trained, or not with this smallest micro-batch; says what can be.
    """
    name = f"model {config.model.name}"
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"{name}: has no parameter to train: all have requires_grad = False, or there are none"
        )
    smallest, full = smallest_micro_batch(plan, world_size, config.train), split_batch(config, world_size)
    shape = (index.channels, index.height, index.width)
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if synced and world_size > 1 and not dist.is_initialized():
        smallest = max(smallest, _FEW)  # in training it also has the values of the other ranks
    own = is_target(config.model.name) and not is_of_a_library(config.model.name)
    # Synchronised ranks wait for each other in every pass.
    draws = _DRAWS if own and world_size > 1 and not synced else 1

    def attempt(size: int) -> list[str] | _Failed:
        return _passes(model, (size, *shape), len(index.classes), draws)

    found = attempt(min(smallest, _FEW))
    if isinstance(found, _Failed) and smallest > _FEW:
        found = attempt(smallest)
    if not isinstance(found, _Failed):
        return found
    images = f"{smallest} image{'s' * (smallest > 1)} of {'x'.join(map(str, shape))}"
    enough = next((n for n in (_FEW, full) if n > smallest and not isinstance(attempt(n), _Failed)), None)
    if enough is None:
        where = f"{found.layer}: " if found.layer else ""
        raise UsageError(f"{name}: fails in training on {images}: {where}{found.error}")
    when = "every micro-batch has" if smallest == full else "in the last batch of an epoch, a rank gets"
    remedies = _remedies(plan, world_size, config.train, enough, exact=enough == full)
    remedy = f"use {', or '.join(remedies)}" if remedies else "it needs more training images"
    why = f"{found.layer or 'it'} cannot be trained ({found.error})"
    raise UsageError(f"{name}: {when} only {images}, on which {why}; {remedy}")


def unused_text(names: list[str]) -> str:
    """Returns a note on what `try_training` found."""
    return f"no gradient in a trial step for {some_names(names)}"


def _remedies(plan: Plan, world_size: int, train: TrainConfig, enough: int, *, exact: bool) -> list[str]:
    """Returns settings with which no micro-batch is smaller than `enough`, or other than that if `exact`."""

    def works(*, drop: bool = plan.drop_remainder, **settings: int) -> bool:
        changed = train.model_copy(update=settings)
        try:
            batches = replace(plan, batch_size=changed.batch_size, drop_remainder=drop)
        except UsageError:  # no batch is left
            return False
        size = smallest_micro_batch(batches, world_size, changed)
        return size == enough if exact else size >= enough

    batch_size, accumulate = train.batch_size, 1 if train.reproducible else train.accumulate
    parts = train.virtual_ranks if train.reproducible else world_size * accumulate
    found = []
    if not exact or enough == _FEW:
        steps = range(1, _NEIGHBOURS)
        below = [batch_size - i * parts for i in steps if i * parts < batch_size]
        above = [batch_size + i * parts for i in steps]
        sizes = [next((n for n in side if works(batch_size=n)), None) for side in (below, above)]
        if any(sizes):
            found.append(f"train.batch_size={' or '.join(str(size) for size in sizes if size)}")
        fewer = (n for n in range(accumulate - 1, 0, -1) if accumulate % n == 0)
        found += [f"train.accumulate={n}" for n in fewer if works(accumulate=n)][:1]
    if not plan.drop_remainder and works(drop=True):
        found.append("data.remainder=drop")
    return found


def _passes(model: nn.Module, shape: tuple[int, ...], classes: int, draws: int) -> list[str] | _Failed:
    """Returns the parameters that got no gradient in a pass, or why it failed.

    A model that draws random numbers on the host, as one that skips layers at random does, gets up to `draws`
    passes.
    """
    found: list[str] | _Failed = []
    host = torch.device("cpu")
    for number in range(draws):
        seed_all(counter_rng.derive(_TRIAL, number), next(model.parameters()).device)
        before = generator_states(host)
        found = _training_pass(model, shape, classes)
        after = generator_states(host)
        if found or all(torch.equal(after[name], before[name]) for name in before):
            break
    return found


def _training_pass(model: nn.Module, shape: tuple[int, ...], classes: int) -> list[str] | _Failed:
    """Returns the trainable parameters that got no gradient in one pass of a copy, or why it failed."""
    try:
        trial = copy.deepcopy(model).train()
    except Exception as error:  # some models cannot be copied, and may train all the same
        log.info("not tried in training mode: %s", error_text(error))
        return []
    device = next(trial.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).to(device)
    labels = torch.arange(shape[0], device=device) % classes
    try:
        with _eager():
            output = trial(images)
            scores = all_scores(output)
            expected = [shape[0], classes]
            if not scores or any(_shape(part) != expected for part in scores):
                return _Failed(_wrong_output(output, expected))
            torch.stack([F.cross_entropy(part.float(), labels) for part in scores]).sum().backward()
    except Exception as error:
        if out_of_memory(error):
            raise
        return _Failed(" ".join(error_text(error).split()), _layer(trial, error))
    if any(parameter.grad is not None for parameter in model.parameters()):
        model.zero_grad(set_to_none=True)
        log.info("not tried in training mode: a copy of the model computes with the model's own parameters")
        return []
    return [name for name, value in trial.named_parameters() if value.requires_grad and value.grad is None]


def _shape(part: object) -> list[int] | str:
    return list(part.shape) if isinstance(part, Tensor) else f"a value of type {type(part).__name__}"


def _wrong_output(output: object, expected: list[int]) -> str:
    wanted = f"in training mode, expected scores {expected}"
    if isinstance(output, tuple):
        parts = ", ".join(str(_shape(part)) for part in output)
        return f"returns a tuple of {parts or 'nothing'} {wanted} first, then auxiliary scores of this shape"
    if isinstance(output, Tensor):
        return f"returns {_shape(output)} {wanted}"
    return f"returns {_shape(output)} {wanted}; return them alone, or a tuple of scores and auxiliary scores"


def _layer(model: nn.Module, error: BaseException) -> str | None:
    """Returns the innermost layer in whose code an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if name := names.get(id(frame.f_locals.get("self"))):
            return f"layer {name}"
    return None


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Runs what a user compiles in eager mode, so that it is not compiled for this batch size, too."""
    if "torch._dynamo" in sys.modules:  # which takes a second to import; nothing is compiled without it
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
