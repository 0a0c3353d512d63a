"""The rank's side of supervision: how a rank reports its progress and its exit to the launcher of its node.

A rank connects to the socket that its launcher names in the environment, and receives shared memory. A beat
is one store to it, without a system call. Under another launcher (torchrun, srun, `accelerate launch`) nobody
reads the heartbeat. The launcher's side is `launch/liveness.py`. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
from collections.abc import Mapping
from enum import IntEnum

ADDRESS = "DISTTRAIN_SUPERVISOR"
"""Environment variable in which a launcher names its abstract Unix socket: @name."""

STACKS = signal.SIGRTMIN + 7
"""The signal that asks a rank to write the stacks of its threads to its log."""

STOP = b"stop"
"""The message with which the launcher asks a rank to stop."""

ROW_BYTES = 64
"""Shared memory of a rank: int64 [8]. The first is its progress, the second whether it is saving. One cache
line long, to avoid false sharing between ranks."""


class Phase(IntEnum):
    """What a rank is doing, in the order of a step."""

    START = 0
    DATA = 1
    TO_DEVICE = 2
    AUGMENT = 3
    COMPUTE = 4
    REDUCE = 5
    OPTIMIZE = 6
    REPORT = 7
    EVALUATE = 8
    SAVE = 9
    END = 10


def pack(phase: Phase, step: int, part: int = 0) -> int:
    """Returns progress as one number; the rank with the lowest number is behind the others."""
    return step << 28 | phase << 24 | part


def unpack(progress: int) -> tuple[Phase, int, int]:
    """Returns phase, step and part."""
    return Phase(progress >> 24 & 15), progress >> 28, progress & 0xFFFFFF


def doing(progress: int) -> str:
    """Returns what a rank is doing, in words."""
    phase, step, _ = unpack(max(progress, 0))
    return {
        Phase.START: "while starting",
        Phase.DATA: f"in step {step:,} while loading data",
        Phase.TO_DEVICE: f"in step {step:,} while copying data to the device",
        Phase.AUGMENT: f"in step {step:,} while augmenting images",
        Phase.COMPUTE: f"in step {step:,} while computing",
        Phase.REDUCE: f"in step {step:,} while summing gradients",
        Phase.OPTIMIZE: f"in step {step:,} in the optimizer",
        Phase.REPORT: f"at the log point of step {step:,}",
        Phase.EVALUATE: f"in the evaluation after step {step:,}",
        Phase.SAVE: f"while saving after step {step:,}",
        Phase.END: "at the end of the run",
    }[phase]


class Heartbeat:
    """A rank's progress, and its messages to the launcher.

    Args:
        connection: to the launcher, or None without one.
        row: the rank's shared memory, writable, of ROW_BYTES.
    """

    def __init__(self, connection: socket.socket | None = None, row: memoryview | None = None) -> None:
        self.connection = connection
        self._cells = memoryview(bytearray(ROW_BYTES) if row is None else row).cast("B").cast("q")

    @classmethod
    def connect(cls, environ: Mapping[str, str], rank: int) -> Heartbeat:
        """Returns the heartbeat of a rank, connected to the launcher if the environment names one.

        Raises:
            ConnectionError: the launcher has ended.
        """
        connection = _call(environ, {"rank": rank})
        if connection is None:
            return cls()
        try:
            row, descriptors, _, _ = socket.recv_fds(connection, 64, 1)
            if not descriptors:
                raise ConnectionRefusedError(f"the launcher does not expect rank {rank}")
        except OSError:
            connection.close()
            raise
        memory = mmap.mmap(descriptors[0], 0)
        os.close(descriptors[0])
        begin = int(row) * ROW_BYTES
        return cls(connection, memoryview(memory)[begin : begin + ROW_BYTES])

    def beat(self, phase: Phase, step: int, part: int = 0) -> None:
        """Records the progress of this rank. All ranks of a run make the same sequence of beats.

        Args:
            phase: the phase that begins.
            step: counts from 1; 0 before the first step.
            part: number within the phase, such as a batch; below 2^24.
        """
        self._cells[0] = step << 28 | phase << 24 | part

    def saving(self, active: bool) -> None:
        """Records whether this rank is writing a checkpoint; after a failure, the launcher waits for it."""
        self._cells[1] = active

    @property
    def place(self) -> tuple[Phase, int, int]:
        """Phase, step and part of the last beat."""
        return unpack(self._cells[0])

    def leave(self, exit_code: int) -> None:
        """Announces the exit code of this rank; a rank that exits without it counts as died."""
        if self.connection is not None:
            with contextlib.suppress(OSError):  # the launcher has gone
                self.connection.send(json.dumps({"exit_code": exit_code}).encode())


def report_exits(environ: Mapping[str, str], codes: Mapping[int, int]) -> None:
    """Reports the exit codes of ranks that this process started to the launcher, if there is one.

    Args:
        environ: names the launcher's socket.
        codes: exit codes by rank, negative for a signal.
    """
    with contextlib.suppress(ConnectionError):
        if (connection := _call(environ, {"ended": list(codes.items())})) is not None:
            connection.close()


def _call(environ: Mapping[str, str], message: Mapping[str, object]) -> socket.socket | None:
    """Returns a connection to the launcher, with a message sent, or None if the environment names none."""
    name = environ.get(ADDRESS)
    if name is None:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect("\0" + name.removeprefix("@"))
        connection.send(json.dumps(message).encode())
    except OSError:
        connection.close()
        raise
    return connection
