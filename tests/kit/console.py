"""Input for a dashboard: a run, its records, its GPUs."""

from __future__ import annotations

import re

from disttrain.monitor.dashboard import RunInfo
from disttrain.runs.records import GpuMeans
from kit.run_files import eval_record, train_record

INFO = RunInfo(
    name="alexnet", run_dir="runs/alexnet/1", model="alexnet_cifar", parameters=2_466_000,
    data="cifar10 50,000 train, 10,000 val, 3x32x32", devices="4 x NVIDIA H100", precision="bf16",
    batch_size=512, epochs=10, steps_per_epoch=98, samples_per_epoch=50_000,
)  # fmt: skip

TRAIN = train_record(
    234, epoch=3, samples=119_552, loss=0.12344, accuracy=0.96123, lr=0.001, images_per_s=18_200.4,
    step_time_s=0.02813, data_wait_pct=2.1,
)  # fmt: skip

EVAL = eval_record(196, 0.8123, epoch=2, loss=0.61, correct=8123, total=10000)


def gpus(count: int, hosts: int = 1) -> tuple[GpuMeans, ...]:
    per_host = max(1, count // hosts)
    return tuple(
        GpuMeans(
            host=f"node{i // per_host}", index=i % per_host, uuid=f"GPU-{i}", name="NVIDIA H100",
            utilization_pct=30 + i, memory_used_mib=12_400, memory_total_mib=81_559, power_w=612.4,
            temperature_c=64,
        )
        for i in range(count)
    )  # fmt: skip


def line(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start)).rstrip()


def timeless(text: str) -> list[str]:
    lines = text.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    return [line[10:] for line in lines]
