#!/usr/bin/env bash
#SBATCH --job-name=eval
#SBATCH --nodes=4
#SBATCH --time=08:00:00
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
# Evaluate a model: sbatch slurm/eval.sh --model FOLDER --run-dir runs/eval --data.files FILE... [WORDS]
# The default is one server of 32 GPUs for a 671B model in bf16, over four nodes (16 of 80 GB do not hold it). A requeued
# evaluation begins anew.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec bash slurm/launch.sh evaluate --rollout.tensor-parallel 32 --if-exists archive "$@"
