"""What slurm/train.sh runs, with stand-ins for Slurm's commands that write down how they are called."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kit import GOLDEN, REPOSITORY

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_CPUS_PER_NODE": "32,16(x3),64",
}
STAND_INS = {
    "scontrol": """
        echo "scontrol $*" >>"$CALLS"
        if [[ $1 == show ]]; then printf '%s\\n' gpu03 gpu04; fi""",
    # Starts its command once per node, as srun does, and ends with the highest code.
    "srun": """
        printf 'srun' >>"$CALLS"
        while [[ $1 == --* ]]; do printf ' %s' "$1" >>"$CALLS"; shift; done
        echo >>"$CALLS"
        trap 'echo "srun has USR2" >>"$CALLS"' USR2
        if [[ -n $OUT_OF_TIME ]]; then
          kill -USR2 "$PPID"
          for ((look = 0; look < 1000; look++)); do
            grep -q "srun has USR2" "$CALLS" && break
            sleep 0.02
          done
        fi
        code=0
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
          SLURM_NODEID=$node "$@"; got=$?; ((got > code)) && code=$got
        done
        exit "$code" """,
    "disttrain": """
        printf '%q ' disttrain "$@" | sed 's/ $//' >>"$CALLS"
        echo " (OMP_NUM_THREADS=${OMP_NUM_THREADS-})" >>"$CALLS"
        if [[ -n $STATUS && $SLURM_NODEID == 0 ]]; then echo "$STATUS" >"$RUN_DIR/status.json"; fi
        if [[ $SLURM_NODEID == 0 ]]; then exit "$CODE"; fi
        exit "$CODE_ELSEWHERE" """,
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(
    folder: Path,
    *arguments: str,
    code: int = 0,
    code_elsewhere: int = 0,
    status: dict[str, object] | None = None,
    out_of_time: bool = True,
    **variables: str,
) -> tuple[int, str]:
    """Runs the script as Slurm's batch shell would; returns its exit code and the calls that it made."""
    programs, calls, run_dir = folder / "bin", folder / "calls", folder / "run"
    for made in (programs, run_dir):
        made.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    calls.write_text("")
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "RUN_DIR": str(run_dir)}
    env |= {"CODE": str(code), "CODE_ELSEWHERE": str(code_elsewhere), "OUT_OF_TIME": "yes" * out_of_time}
    env |= {"STATUS": json.dumps(status, indent=1) if status else ""}
    ended = subprocess.run(
        ["bash", REPOSITORY / "slurm/train.sh", *arguments],
        env=env | JOB | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ended.returncode, calls.read_text().replace(str(folder), "FOLDER")


def ended(code: int | None, minute: int = 5, **more: object) -> dict[str, object]:
    """Returns what status.json holds of a run that ended with a code, or goes on."""
    return {"state": "any", "exit_code": code, "updated_at": f"2026-11-21T00:{minute:02}:12.123456Z", **more}


@pytest.mark.integration
def test_what_it_runs(tmp_path):
    calls = []
    for title, arguments, variables in [
        ("two nodes", ("a.yaml", "optim.lr=0.1"), {}),
        ("CPUs per task", ("a.yaml",), {"SLURM_CPUS_PER_TASK": "16", "OMP_NUM_THREADS": "4"}),
        ("a job array", ("a.yaml", "seed=%a", "name=a b"), {"SLURM_ARRAY_TASK_ID": "7"}),
        ("one node", ("a.yaml", "--gpus", "4"), {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "4712"}),
    ]:
        code, made = run(tmp_path, *arguments, out_of_time=False, **variables)
        assert code == 0
        calls.append(f"{title}\n{made}")
    text = "\n".join(calls)
    golden = GOLDEN / "train_sh.txt"
    if "ACCEPT" in os.environ:
        golden.write_text(text)
    assert text == golden.read_text(), (
        "slurm/train.sh runs something else than before; if it should, "
        "ACCEPT=1 python -m pytest tests/launch/test_train_script.py, and look at the difference"
    )


@pytest.mark.integration
@pytest.mark.parametrize(
    ("outcome", "expected", "requeued"),
    [
        ({"code": 75, "status": ended(75)}, 75, True),
        ({"code": 0, "status": ended(0)}, 0, False),
        ({"code": 70, "status": ended(70)}, 70, False),
        # srun has the highest code of the nodes, which is not the run's.
        ({"code": 75, "code_elsewhere": 143, "status": ended(75)}, 75, True),
        ({"code": 65, "code_elsewhere": 75, "status": ended(65)}, 65, False),
        ({"code": 75, "code_elsewhere": 75, "status": ended(0)}, 0, False),
        # Ended before it could say anything, or without a word.
        ({"code": 137, "status": ended(None)}, 137, False),
        ({"code": 127}, 127, False),
        ({"code": 75, "status": ended(75, reason='"exit_code": 0,', error='a\n"exit_code": 0')}, 75, True),
        # Somebody has asked the run itself to stop.
        ({"code": 75, "status": ended(75), "out_of_time": False}, 75, False),
        ({"code": 75, "status": ended(75), "SLURM_RESTART_COUNT": "19"}, 75, True),
        ({"code": 75, "status": ended(75), "SLURM_RESTART_COUNT": "20"}, 75, False),
        ({"code": 75, "status": ended(75), "MAX_REQUEUES": "0"}, 75, False),
    ],
)
def test_the_run_decides_whether_its_job_goes_back_into_the_queue(tmp_path, outcome, expected, requeued):
    code, calls = run(tmp_path, "a.yaml", **outcome)
    assert code == expected
    assert ("scontrol requeue 4711" in calls) == requeued


@pytest.mark.integration
def test_stale_status_is_ignored_after_requeue(tmp_path):
    _, calls = run(tmp_path, "a.yaml", code=75, status=ended(75))
    assert "requeue" in calls
    code, calls = run(tmp_path, "a.yaml", code=1)  # the second one does not even begin
    assert code == 1
    assert "requeue" not in calls


@pytest.mark.integration
def test_a_second_slice_that_ends_like_the_first_is_requeued_again(tmp_path):
    for minute in (5, 6):
        code, calls = run(tmp_path, "a.yaml", code=75, code_elsewhere=137, status=ended(75, minute))
        assert code == 75
        assert "scontrol requeue 4711" in calls


def test_without_a_config_it_starts_nothing(tmp_path):
    code, calls = run(tmp_path)
    assert (code, calls) == (2, "")
