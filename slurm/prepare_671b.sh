#!/usr/bin/env bash
#SBATCH --job-name=prepare_671b
#SBATCH --nodes=1
#SBATCH --time=08:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
# From DeepSeek's published FP8 folder to the bf16 one that grpo_671b starts from, on the CPUs of one node. A requeued or
# repeated job goes on where it was.
#   sbatch slurm/prepare_671b.sh [PUBLISHED [TARGET [WORDS of tools/prepare_checkpoint.py]]]
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
published=${1:-models/DeepSeek-V3-Base-FP8}
target=${2:-models/DeepSeek-V3-Base}
shift $(($# < 2 ? $# : 2))
workers=$((${SLURM_CPUS_ON_NODE:-2} < 16 ? ${SLURM_CPUS_ON_NODE:-2} : 16))
exec bash slurm/launch.sh task "${PYTHON:-python3}" tools/prepare_checkpoint.py "$published" "$target" --workers "$workers" "$@"
