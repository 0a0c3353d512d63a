#!/bin/bash
# Trains an experiment on the nodes of a Slurm job:
#
#   sbatch [options of sbatch] slurm/train.sh CONFIG [KEY=VALUE ...] [options of disttrain run]
#   sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=02:00:00 slurm/train.sh configs/resnet18_cifar.yaml
#
# Each node has one task: `disttrain run`, which starts one process per GPU of its node. Before the time limit, the
# run saves a checkpoint and stops (exit 75), and the job requeues itself. It then resumes in the same run folder.
#SBATCH --job-name=disttrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=disttrain-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120

# Edit these lines for your cluster, if the job does not inherit the settings from the shell that calls sbatch. Leave
# the rest as it is.
# module load cuda
# source ~/venvs/disttrain/bin/activate
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0  # if a node has several networks
inside=()       # (apptainer exec --nv ~/disttrain.sif) runs disttrain in a container
srun_options=() # (--container-image=disttrain.sqsh) or other options for srun

set -u
refuse() {
  echo "slurm/train.sh: $1" >&2
  exit 2
}
if (($# == 0)); then
  echo "usage: sbatch slurm/train.sh CONFIG [KEY=VALUE ...] [options of disttrain run]" >&2
  exit 2
fi
if [[ $1 == --sweep ]]; then # a file of `disttrain sweep --slurm`: the line of a job is that of its array index
  words=()
  IFS=$'\t' read -r -a words < <(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" "${2-}")
  ((${#words[@]})) || refuse "--sweep ${2-}: has no line for the array index ${SLURM_ARRAY_TASK_ID:-0}"
  set -- "${words[@]}" "${@:3}"
fi
arguments=("${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}" "$@")
arguments=("${arguments[@]//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
run_dir=${arguments[0]}
arguments=("${arguments[@]:1}")
elastic=''
for ((i = 0; i < ${#arguments[@]}; i++)); do
  word=${arguments[i]}
  name=${word%%=*}
  value=${word#*=}
  [[ $word == *=* ]] || value=${arguments[i + 1]-}
  case ${name//_/-} in
  --run-dir)
    [[ -n $value ]] || refuse "--run-dir needs a folder"
    run_dir=$value
    ;;
  --nodes)
    [[ $value == "$SLURM_JOB_NUM_NODES" ]] || refuse "--nodes $value: sbatch gave this job $SLURM_JOB_NUM_NODES \
node(s); tell sbatch: sbatch --nodes=$value ... slurm/train.sh CONFIG"
    ;;
  --wait-for-nodes) elastic=1 ;;
  --node-rank) refuse "--node-rank: each node of the job has a number of its own; leave it out" ;;
  esac
done
# By this secret the nodes know each other; srun hands it on.
export DISTTRAIN_SECRET="${DISTTRAIN_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
max_requeues=${MAX_REQUEUES:-20}
export DISTTRAIN_REQUEUES_LEFT=$((max_requeues - ${SLURM_RESTART_COUNT:-0})) # for monitor.on_end
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
main_host=${hosts[0]}
main_port=$((20000 + SLURM_JOB_ID * 8 % 12000)) # different for jobs on the same node; below the ephemeral ports

# The last of two equal options wins: the user's come after ours.
run=(disttrain run --run-dir "$run_dir" --nodes "$SLURM_JOB_NUM_NODES")
run+=(--master-addr "$main_host" --master-port "$main_port" "${arguments[@]}")
# One task per node, whatever the options of sbatch. srun does not inherit --cpus-per-task from sbatch. If sbatch has
# none either, each task gets as many CPUs as the job has on the node with the fewest.
tasks=${SLURM_NTASKS_PER_NODE:-1}
if ((tasks != 1)); then
  echo "slurm/train.sh: --ntasks-per-node=$tasks: each node gets one task with the CPUs of all $tasks; in it, \
disttrain run starts one process per GPU (or give --gpus N or --procs N)" >&2
fi
fewest_cpus=$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
# With --wait-for-nodes, each node has a step of its own, which can be started again.
nodes=${elastic:-$SLURM_JOB_NUM_NODES}
step=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
cpus=${SLURM_CPUS_PER_TASK:+$((SLURM_CPUS_PER_TASK * tasks))}
step+=(--cpus-per-task="${cpus:-$fewest_cpus}" --kill-on-bad-exit=1)

# Reads the run's own exit code: srun returns only the highest code of its tasks, which may not be the outcome.
said() { sed -n 's/^ *"\(exit_code\|updated_at\)": *\(.*[^,]\),\{0,1\}$/\1=\2/p' "$run_dir/status.json" 2>/dev/null; }
said_before=$(said)
ended() { # prints the run's exit code if it has ended in this time slice
  local now
  now=$(said)
  [[ $now != "$said_before" && $now =~ exit_code=([0-9]+) ]] && echo "${BASH_REMATCH[1]}"
}

resume_by_hand() { printf "$(date -u +%H:%M:%S)  $1; resume with RUN_DIR=%q sbatch ...\n" "$run_dir" >&2; }

out_of_time='' sruns=() began=()
# srun forwards USR2 to the launchers; on TERM it would end the step at once.
trap 'out_of_time=1; ((${#sruns[@]} == 0)) || kill -USR2 "${sruns[@]}" 2>/dev/null' USR2
start() { # starts the step of all nodes, or of the node $1
  local which=()
  [[ -z $elastic ]] || which=(--nodelist="${hosts[$1]}" --no-kill)
  # In the background, because bash runs no trap while it waits for a command in the foreground. The rank of a node is
  # known only inside its task, unless it has a step of its own.
  # shellcheck disable=SC2016
  "${step[@]}" "${which[@]}" "${srun_options[@]}" \
    bash -c 'node=${1:-$SLURM_NODEID} && shift && exec "$@" --node-rank "$node"' task "${elastic:+$1}" \
    "${inside[@]}" "${run[@]}" &
  sruns[$1]=$!
  began[$1]=$SECONDS
  [[ -z $out_of_time ]] || kill -USR2 "${sruns[$1]}" # the trap ran before srun was started
}
start_again() { # starts the launchers that have died on nodes that the job still has
  local node left
  for ((node = 1; node < ${#sruns[@]}; node++)); do
    if kill -0 "${sruns[node]}" 2>/dev/null || ((SECONDS < began[node] + 30)); then continue; fi
    left=$(scontrol show hostnames "$(squeue --noheader --job "$SLURM_JOB_ID" --format %N)")
    [[ $'\n'$left$'\n' == *$'\n'${hosts[node]}$'\n'* ]] || continue
    echo "$(date -u +%H:%M:%S)  starting node $node (${hosts[node]}) again"
    start "$node"
  done
}
for ((node = 0; node < (${elastic:-0} ? SLURM_JOB_NUM_NODES : 1); node++)); do
  start "$node"
done
waited=0
while kill -0 "${sruns[0]}" 2>/dev/null; do
  sleep 1 &
  wait $! # returns at once when the trap has run
  # srun may wait for ever for the tasks of a node that is gone, although all others have ended.
  if [[ $(ended) == 7[01] ]]; then waited=$((waited + 1)); else waited=0; fi
  ((waited <= 10)) || kill -KILL "${sruns[0]}"
  [[ -n $out_of_time || -n $(ended) ]] || start_again
done
wait "${sruns[0]}"
code=$?
for ((look = 0; look < 10 && ${#sruns[@]} > 1; look++)); do # the others hear of the end from node 0
  kill -0 "${sruns[@]:1}" 2>/dev/null || break
  sleep 1
done
if verdict=$(ended); then
  code=$verdict
fi
if [[ $code == 75 && -n $out_of_time ]]; then # a stop for any other reason is final
  if ((DISTTRAIN_REQUEUES_LEFT > 0)); then
    echo "$(date -u +%H:%M:%S)  saved and stopped; requeueing the job"
    scontrol requeue "$SLURM_JOB_ID" || resume_by_hand "not requeued (sbatch --no-requeue?)"
  else
    resume_by_hand "saved and stopped after $max_requeues requeues (MAX_REQUEUES)"
  fi
fi
exit "$code"
