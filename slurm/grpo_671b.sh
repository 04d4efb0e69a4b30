#!/usr/bin/env bash
#SBATCH --job-name=grpo_671b
#SBATCH --nodes=96
#SBATCH --time=1-00:00:00
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
# R1-Zero on DeepSeek-V3-Base: 64 nodes of 8 GPUs train (PP16 x EP32), 32 more serve 8 vLLM servers of 32 GPUs each,
# or, in FP8, 16 of 16 GPUs: --rollout.fp8-folder FOLDER --rollout.tensor-parallel 16 --rollout.num-engines 16.
# Other sizes: `megatron-r1 nodes grpo_671b --slots-per-node 8 [WORDS]` says how many nodes, `sbatch --nodes=N
# slurm/grpo_671b.sh [WORDS]` overrides the number above; WORDS are fields of the recipe.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec bash slurm/launch.sh grpo_671b --if-exists resume "$@"
