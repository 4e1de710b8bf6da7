#!/usr/bin/env bash
# One run as a job of a Ray cluster that is there already (RAY_ADDRESS, such as http://head:8265).
#
#   RAY_ADDRESS=http://head:8265 recipes/cluster/ray_job.sh recipes/cluster/llada_8b_rl.yaml /shared/runs/llada_8b
#
# Further arguments are overrides. Submitting it again continues the run. The cluster's nodes have DARE installed and share
# the file system of the model and the run folder; the recipe travels with the working directory.
set -euo pipefail

recipe=$1
out=$2
shift 2

ray job submit --working-dir . -- dare train "$recipe" --out "$out" --resume executor.address=auto "$@"
