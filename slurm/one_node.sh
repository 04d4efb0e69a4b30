#!/usr/bin/env bash
#SBATCH --job-name=one_node
#SBATCH --nodes=1
#SBATCH --time=1-00:00:00
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
# A recipe on one node of eight GPUs:
#   sbatch slurm/one_node.sh grpo_qwen_7b [WORDS]
#   sbatch --gpus-per-node=1 --job-name=grpo_qwen_1_5b slurm/one_node.sh grpo_qwen_1_5b
# Recipes for it: grpo_qwen_1_5b (one GPU), grpo_qwen_7b, grpo_qwen_7b_colocated, grpo_moe_16b, distill_qwen_7b. WORDS are
# fields of the recipe. Without Slurm the same is `megatron-r1 run NAME [WORDS]`.
[ $# -ge 1 ] || { echo "one_node.sh: name a recipe: sbatch slurm/one_node.sh grpo_qwen_7b" >&2; exit 2; }
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
case "$1" in
    -*) exec bash slurm/launch.sh --if-exists resume "$@" ;; # --config FILE, which names the recipe
    *) exec bash slurm/launch.sh "$1" --if-exists resume "${@:2}" ;;
esac
