#!/usr/bin/env bash
# A Ray cluster over the nodes of a SLURM allocation, one run on it, and the end of both.
#
#   sbatch --nodes=2 --gpus-per-node=8 recipes/cluster/slurm.sh recipes/cluster/llada_8b_rl.yaml /shared/runs/llada_8b
#
# Further arguments are overrides. A job that is requeued continues its run. The environment that has `dare` and `ray` must
# be active on all nodes; the recipe, the model and the run folder must be on a file system that all nodes share.
#SBATCH --job-name=dare
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --time=24:00:00
set -euo pipefail

recipe=$1
out=$2
shift 2

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address="$head:$((20000 + SLURM_JOB_ID % 20000))"

started=()
trap 'kill "${started[@]}" 2>/dev/null || true' EXIT # the steps that were started here, and nothing else

srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="${address##*:}" --disable-usage-stats --block &
started+=($!)
sleep "${DARE_HEAD_SECONDS:-20}"
if ((${#nodes[@]} > 1)); then
    others=$((${#nodes[@]} - 1))
    srun --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address="$address" --disable-usage-stats --block &
    started+=($!)
    sleep "${DARE_NODES_SECONDS:-20}"
fi

dare train "$recipe" --out "$out" --resume "executor.num_workers=$((${#nodes[@]} * SLURM_GPUS_ON_NODE))" \
    "executor.address=$address" "$@"
