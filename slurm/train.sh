#!/bin/bash
# Trains an experiment on the nodes of a Slurm job:
#
#   sbatch [options of sbatch] slurm/train.sh CONFIG [KEY=VALUE ...]
#   sbatch --gpus-per-node=4 --time=02:00:00 slurm/train.sh configs/resnet18_cifar.yaml
#
# One task per node: `disttrain run` starts one process per GPU of its node. Before the time limit the run saves
# and stops (exit 75) and the job puts itself back into the queue, where it goes on in the same run folder.
#SBATCH --job-name=disttrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=disttrain-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120

# What your cluster needs before `disttrain` is found, unless the job inherits it from where you call sbatch:
# module load cuda
# source ~/venvs/disttrain/bin/activate

run_dir=${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}
max_requeues=${MAX_REQUEUES:-20}

if (($# == 0)); then
  echo "usage: sbatch slurm/train.sh CONFIG [KEY=VALUE ...]" >&2
  exit 2
fi

stopping=
# srun hands USR2 on to the launchers; TERM would make it end the step at once.
trap 'stopping=1; kill -USR2 "$srun"' USR2

# In the background, because bash runs no trap while it waits for a command in the foreground.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  disttrain run "$@" --run-dir "$run_dir" &
srun=$!
while true; do
  wait "$srun"
  code=$?
  kill -0 "$srun" 2>/dev/null || break # wait also returns when the trap has run
done

if [[ $code == 75 && -n $stopping && ${SLURM_RESTART_COUNT:-0} -lt $max_requeues ]]; then
  echo "$(date -u +%H:%M:%S)  out of time: back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
