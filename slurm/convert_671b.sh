#!/usr/bin/env bash
#SBATCH --job-name=convert_671b
#SBATCH --nodes=1
#SBATCH --time=08:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
# Any conversion of tools/convert_checkpoint.py on the CPUs of one node. What is written stays after a requeue. The
# folders that grpo_671b starts from are made by prepare_671b.sh; this is for results, such as a policy in FP8:
#   sbatch slurm/convert_671b.sh hf-to-hf runs/grpo_671b/policy runs/grpo_671b/policy-fp8 --precision fp8 [OPTIONS]
[ $# -ge 3 ] || { echo "convert_671b.sh: give what tools/convert_checkpoint.py takes: HOW SOURCE TARGET" >&2; exit 2; }
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
resume=()
[ ! -e "$3.partial" ] || resume=(--resume)
exec bash slurm/launch.sh task "${PYTHON:-python3}" tools/convert_checkpoint.py "$@" ${resume[@]+"${resume[@]}"}
