"""A plan that tests of the launcher change to what they need."""

from pathlib import Path

from disttrain.launch.plan import LaunchPlan

ONE = LaunchPlan(
    config_path=Path("a.yaml"),
    overrides=(),
    run_dir=Path("runs/a"),
    resume="auto",
    device="cpu",
    processes=1,
    gpus=(),
    threads=4,
)
"""A process on a CPU."""
