"""What slurm/train.sh runs, with stand-ins for Slurm's commands that write down how they are called."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

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
        if [[ $1 == show ]]; then printf '%s\\n' gpu03 gpu04; else [[ -z $NO_REQUEUE ]]; fi""",
    # Starts its command once per node, as srun does, and ends with the highest code.
    "srun": """
        line=srun # in one piece, since several may be started at once
        nodes=$SLURM_JOB_NUM_NODES
        while [[ $1 == --* ]]; do
          [[ $1 == --nodes=* ]] && nodes=${1#*=}
          line+=" $1"; shift
        done
        echo "$line" >>"$CALLS"
        trap 'echo "srun has USR2" >>"$CALLS"' USR2
        if [[ -n $OUT_OF_TIME ]]; then
          kill -USR2 "$PPID"
          for ((look = 0; look < 1000; look++)); do
            grep -q "srun has USR2" "$CALLS" && break
            sleep 0.02
          done
        fi
        code=0
        for ((node = 0; node < nodes; node++)); do
          SLURM_NODEID=$node "$@"; got=$?; ((got > code)) && code=$got
        done
        exit "$code" """,
    "disttrain": """
        echo "$(printf '%q ' disttrain "$@")(OMP_NUM_THREADS=${OMP_NUM_THREADS-})" >>"$CALLS"
        echo "$DISTTRAIN_SECRET" >>"$WRITES/secrets"
        echo "$DISTTRAIN_REQUEUES_LEFT" >"$WRITES/left"
        if [[ -n $STATUS && $SLURM_NODEID == 0 ]]; then echo "$STATUS" >"$WRITES/status.json"; fi
        if [[ $SLURM_NODEID == 0 ]]; then exit "$CODE"; fi
        exit "$CODE_ELSEWHERE" """,
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run_all(
    folder: Path,
    *arguments: str,
    code: int = 0,
    code_elsewhere: int = 0,
    status: dict[str, object] | None = None,
    out_of_time: bool = True,
    **variables: str,
) -> tuple[int, str, str]:
    """Runs the script as Slurm's batch shell would; returns exit code, calls and errors."""
    programs, calls, run_dir = folder / "bin", folder / "calls", folder / "run"
    for made in (programs, run_dir):
        made.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    calls.write_text("")
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "RUN_DIR": str(run_dir)}
    env |= {"CODE": str(code), "CODE_ELSEWHERE": str(code_elsewhere), "OUT_OF_TIME": "yes" * out_of_time}
    env |= {"STATUS": json.dumps(status, indent=1) if status else "", "WRITES": str(run_dir)}
    ended = subprocess.run(
        ["bash", REPOSITORY / "slurm/train.sh", *arguments],
        env=env | JOB | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ended.returncode, calls.read_text().replace(str(folder), "FOLDER"), ended.stderr


def run(folder: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    """Returns exit code and calls, as `run_all` does."""
    return run_all(folder, *arguments, **options)[:2]


def ended(code: int | None, minute: int = 5, **more: object) -> dict[str, object]:
    """Returns what status.json holds of a run that ended with a code, or goes on."""
    return {"state": "any", "exit_code": code, "updated_at": f"2026-11-21T00:{minute:02}:12.123456Z", **more}


@pytest.mark.integration
def test_what_it_runs(tmp_path):
    calls = []
    sweep = tmp_path / "array.tsv"
    sweep.write_text("a.yaml\tseed=0\t--run-dir\ts/0\na.yaml\tmodel.args={a: b c}\t--run-dir\ts/1\n")
    for title, arguments, variables in [
        ("two nodes", ("a.yaml", "optim.lr=0.1"), {}),
        ("CPUs per task", ("a.yaml",), {"SLURM_CPUS_PER_TASK": "16", "OMP_NUM_THREADS": "4"}),
        ("a job array", ("a.yaml", "seed=%a", "name=a b"), {"SLURM_ARRAY_TASK_ID": "7"}),
        (
            "a job array with a run folder",
            ("a.yaml", "seed=%a"),
            {"SLURM_ARRAY_TASK_ID": "7", "RUN_DIR": "r%a"},
        ),
        ("a sweep", ("--sweep", str(sweep), "--gpus", "4"), {"SLURM_ARRAY_TASK_ID": "1"}),
        ("the user's folder", ("a.yaml", "--run-dir", "my runs/%a"), {"SLURM_ARRAY_TASK_ID": "7"}),
        ("the user's address", ("a.yaml", "--master_addr=gpu03-ib", "--master-port", "29500"), {}),
        ("the job's nodes", ("--nodes=2", "a.yaml"), {}),
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
def test_the_nodes_of_a_job_know_a_secret_of_its_own(tmp_path):
    run(tmp_path, "a.yaml", DISTTRAIN_SECRET="")
    _, calls = run(tmp_path, "a.yaml", DISTTRAIN_SECRET="")
    run(tmp_path, "a.yaml", DISTTRAIN_SECRET="chosen by the user")
    secrets = (tmp_path / "run/secrets").read_text().splitlines()
    assert [secrets[0], secrets[2], secrets[4]] == [secrets[1], secrets[3], secrets[5]]
    assert len(secrets[0]) == len(secrets[2]) == 64
    assert secrets[0] != secrets[2]
    assert secrets[4] == "chosen by the user"
    assert secrets[2] not in calls, "other users see the command lines of a node"


@pytest.mark.integration
def test_several_tasks_per_node_become_one_with_their_cpus(tmp_path):
    given = {"SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}
    code, calls, errors = run_all(tmp_path, "a.yaml", out_of_time=False, **given)
    assert code == 0
    assert "--ntasks-per-node=1 --cpus-per-task=32" in calls
    assert errors.count("--ntasks-per-node=4: each node gets one task with the CPUs of all 4") == 1


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
    assert not requeued or int((tmp_path / "run/left").read_text()) > 0, "the run knows before"


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


@pytest.mark.integration
@pytest.mark.parametrize(
    "option",
    [("--run-dir", "{}"), ("--run-dir={}",), ("--run_dir", "{}"), ("--run-dir", "no", "--run_dir={}")],
)
def test_the_outcome_is_read_in_the_folder_that_the_user_names(tmp_path, option):
    mine = tmp_path / "my run"
    mine.mkdir()
    arguments = [word.format(mine) for word in option]
    code, calls = run(tmp_path, "a.yaml", *arguments, code=137, status=ended(75), WRITES=str(mine))
    assert code == 75, "the run's own, not that of srun"
    assert "scontrol requeue 4711" in calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nodes", "4"), "--nodes 4: sbatch gave this job 2 node(s); tell sbatch: sbatch --nodes=4 ... "),
        (("--nodes=1",), "--nodes 1: sbatch gave this job 2 node(s); tell sbatch: sbatch --nodes=1 ... "),
        (("--node_rank=1",), "--node-rank: each node of the job has a number of its own; leave it out"),
        (("optim.lr=1", "--node-rank", "0"), "--node-rank: each node"),
        (("--run-dir",), "--run-dir needs a folder"),
    ],
)
def test_what_is_not_the_users_to_say_is_refused_before_anything_starts(tmp_path, arguments, words):
    code, calls, errors = run_all(tmp_path, "a.yaml", *arguments)
    assert (code, calls) == (2, "")
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"slurm/train.sh: {words}")


@pytest.mark.integration
def test_a_job_that_may_not_be_requeued_says_how_to_go_on(tmp_path):
    code, calls, errors = run_all(
        tmp_path, "a.yaml", "--run-dir", str(tmp_path / "run"), code=75, status=ended(75), NO_REQUEUE="yes"
    )
    assert code == 75
    assert "scontrol requeue 4711" in calls
    assert "not requeued (sbatch --no-requeue?)" in errors
    assert errors.endswith(f"resume with RUN_DIR={tmp_path}/run sbatch ...\n")


def test_without_a_config_it_starts_nothing(tmp_path):
    code, calls = run(tmp_path)
    assert (code, calls) == (2, "")
    code, calls, errors = run_all(tmp_path, "--sweep", "/dev/null", SLURM_ARRAY_TASK_ID="3")
    assert (code, calls) == (2, "")
    assert errors == "slurm/train.sh: --sweep /dev/null: has no line for the array index 3\n"


@pytest.mark.integration
def test_with_wait_for_nodes_each_node_has_a_step_of_its_own(tmp_path):
    arguments = ("a.yaml", "--max-restarts", "3", "--wait-for-nodes", "60")
    code, calls = run(tmp_path, *arguments, out_of_time=False)
    assert code == 0
    for rank, host in enumerate(("gpu03", "gpu04")):
        assert f" --nodelist={host} --no-kill" in calls
        assert f"--wait-for-nodes 60 --node-rank {rank} (" in calls
    assert calls.count("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 ") == 2
