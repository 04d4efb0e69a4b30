#!/usr/bin/env bash
#SBATCH --job-name=distill_32b
#SBATCH --nodes=8
#SBATCH --time=1-00:00:00
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
# Qwen2.5-32B on the teacher's samples (data/distill.jsonl): 8 nodes of 8 GPUs, TP8.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec bash slurm/launch.sh distill_32b --if-exists resume "$@"
