"""Starts two workers as `srun --ntasks-per-node=2 python -m disttrain.worker` does."""

import os
import subprocess
import sys

job = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "localhost",
}
command = [sys.executable, "-m", "disttrain.worker", *sys.argv[1:]]
tasks = [
    subprocess.Popen(command, env=os.environ | job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(2)
]
sys.exit(max(task.wait() for task in tasks))
