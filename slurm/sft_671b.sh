#!/usr/bin/env bash
#SBATCH --job-name=sft_671b
#SBATCH --nodes=64
#SBATCH --time=1-00:00:00
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
# Supervised fine-tuning of DeepSeek-V3-Base on data/sft.jsonl: 64 nodes of 8 GPUs, no servers.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec bash slurm/launch.sh sft_671b --if-exists resume "$@"
