"""Step time with train.reproducible beside the ordinary mode, on the same process and threads.

    python benchmarks/same_bits.py --data ROOT [--models cnn_mnist lenet_bn alexnet_cifar resnet18]
        [--runs 15] [--virtual-ranks 4 8] [--batch 64] [--precision fp32] [--seconds 0.5] [--gpu]

All modes take turns in one process: the ordinary step, and the reproducible one for each number of virtual
ranks. On a CPU all use one thread, as the mode does, and a time is that of the processor. A value is the
median over the rounds of the ratio within a round, with its quartiles. `ordinary again` is the noise of the
machine. `passes alone` are the forward and backward passes of the parts divided by one pass of the whole
batch: what smaller batches cost on this machine without anything that disttrain does.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable

from common import PLAIN, RECIPES, config, machine, parser, print_json_or, tell, variables

AT_MOST = {"alexnet_cifar": 1.10, "resnet18": 1.10, "cnn_mnist": 1.30, "lenet_bn": 1.30}  # with 4, in fp32
AT_MOST_ON_GPU = 1.15
ORDINARY, AGAIN, PASSES = "ordinary", "ordinary again", ", passes alone"


def mode_of(state, gpu: bool) -> dict[str, Callable[[], None]]:
    """Returns what takes a step of a run, and what only runs the passes of its first step."""
    import torch

    from disttrain.training.microbatch import augment_micro_batch, prefetch
    from disttrain.training.phases import Phases
    from disttrain.training.step import backward, forward
    from disttrain.training.virtual_ranks import step_function

    def endless():
        for epoch in itertools.count():
            order = state.plan.order(epoch)
            state.augment.start_epoch(epoch, order, *state.image_size)
            yield from prefetch(state, epoch, range(state.plan.samples // state.plan.batch_size), order)

    def set_up() -> None:
        torch.use_deterministic_algorithms(state.config.train.reproducible)
        torch.backends.cudnn.benchmark = gpu and not state.config.train.reproducible

    batches, take_step = endless(), step_function(state.config.train)
    micro, batch = next(batches)
    inputs = augment_micro_batch(state, micro, batch.to(state.accelerator.device))
    state.model.train()

    def step() -> None:
        set_up()
        take_step(state, batches, 1, state.plan.batch_size, Phases())
        state.meter.restart()

    def passes() -> None:
        set_up()
        for _, images, labels, partners, _ in inputs:
            loss, _ = forward(state, micro, images, labels, partners)
            backward(state, loss, 1 / state.plan.batch_size)
            state.drop_gradients()

    return {"": step, PASSES: passes}


def steps(options, model: str) -> dict[str, list[float]]:
    """Returns the seconds of a step in every round, by mode."""
    import torch
    from accelerate.state import AcceleratorState

    from disttrain.config import load_config
    from disttrain.preflight import open_index
    from disttrain.training.build import build
    from disttrain.training.group import join
    from disttrain.training.rank import Rank

    modes = {ORDINARY: [], AGAIN: []} | {
        f"{number} virtual ranks": ["train.reproducible=true", f"train.virtual_ranks={number}"]
        for number in options.virtual_ranks
    }
    measured: dict[str, Callable[[], None]] = {}
    for name, overrides in modes.items():
        fixed = ["train.compile=false", "train.cuda_graph=false", f"train.precision={options.precision}"]
        settings = [*PLAIN, *fixed, f"train.batch_size={options.batch}", "train.channels_last=true"]
        found = load_config(config(RECIPES[model].config), [*settings, *overrides])
        AcceleratorState._reset_state()
        index = open_index(found, print)
        group = join(found, "cuda" if options.gpu else "cpu")
        torch.use_deterministic_algorithms(False)  # each step sets its own
        state, _, _ = build(found, Rank(0, None), group, index, None)
        measured |= {name + what: function for what, function in mode_of(state, options.gpu).items()}
    del measured[AGAIN + PASSES]

    def seconds_of(name: str, number: int) -> float:
        if number > 1:
            measured[name]()  # the first one after another mode is slower
        if options.gpu:
            torch.cuda.synchronize()
        clock = time.perf_counter if options.gpu else time.process_time
        began = clock()
        for _ in range(number):
            measured[name]()
        if options.gpu:
            torch.cuda.synchronize()
        return (clock() - began) / number

    for name, measure in measured.items():
        tell(f"warm-up: {model}, {name}")
        measure()
    number = max(1, round(options.seconds / seconds_of(ORDINARY, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    names = list(measured)
    for turn in range(options.runs):
        tell(f"round {turn + 1} of {options.runs}: {model}")
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(seconds_of(name, number))
    return seconds


def main() -> None:
    arguments = parser(__doc__, runs=15)
    arguments.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments.add_argument("--virtual-ranks", nargs="+", type=int, default=[4, 8])
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments.add_argument("--seconds", type=float, default=0.5, help="of a mode in a round")
    arguments.add_argument("--gpu", action="store_true", help="use one GPU instead of the CPU")
    options = arguments.parse_args()
    if options.runs < 2:
        arguments.error("there are two rounds at least")
    if "OMP_NUM_THREADS" not in os.environ:  # read when torch is imported
        env = variables(options.data, 1, **({} if options.gpu else {"CUDA_VISIBLE_DEVICES": ""}))
        os.execve(sys.executable, [sys.executable, *sys.argv], env)
    found, results = {}, []
    for model in options.models:
        found[model] = steps(options, model)
        for mode, values in found[model].items():
            other = found[model][ORDINARY + PASSES * mode.endswith(PASSES)]
            if values is other:
                continue
            ratios = [one / another for one, another in zip(values, other, strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            bound = None
            if mode == "4 virtual ranks" and (options.gpu or options.precision == "fp32"):
                bound = AT_MOST_ON_GPU if options.gpu else AT_MOST[model]
            result = {"model": model, "what": mode, "value": median, "low": low, "high": high}
            results.append(result | {"at_most": bound})
    facts = machine() | {key: getattr(options, key) for key in ("batch", "precision")} | {"n": options.runs}

    def table() -> None:
        for model, seconds in found.items():
            print(f"{model}: {1e3 * statistics.median(seconds[ORDINARY]):.2f} ms a step in the ordinary mode")
            for claim in (result for result in results if result["model"] == model):
                bound = "" if claim["at_most"] is None else f"  at most {claim['at_most']:g}"
                missed = "  not reached" if bound and claim["value"] > claim["at_most"] else ""
                quartiles = f"({claim['low']:.3f} to {claim['high']:.3f})"
                print(f"  {claim['what']:<30} {claim['value']:6.3f} {quartiles:<18}{bound}{missed}")

    print_json_or(table, options, facts, seconds=found, claims=results)


if __name__ == "__main__":
    main()
