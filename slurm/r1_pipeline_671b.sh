#!/usr/bin/env bash
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
#SBATCH --time=1-00:00:00
# All of R1 as a chain of jobs, one for each stage, each with as many nodes as it needs and after the stages that it needs.
# A chain and no job array, because an array's jobs all have the same size.
#
#   bash slurm/r1_pipeline_671b.sh [WORDS]             submits the chain (on a login node; needs no torch there)
#   SBATCH_TIMELIMIT=... SBATCH_PARTITION=... bash ... settings of all jobs
#   RECIPE=r1_tiny GPUS_PER_NODE=2 bash ...            another pipeline
#   STAGES="second_sft final_rl" bash ...              some of its stages
#
# A stage that is up to date ends at once, so the same command goes on after something was mended.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
RECIPE=${RECIPE:-r1_671b}

if [ -n "${SLURM_JOB_ID:-}" ]; then
    exec bash slurm/launch.sh "$RECIPE" --only "${STAGE:?the stage to run}" "$@"
fi

# shellcheck source=/dev/null
[ ! -r slurm/site.sh ] || . slurm/site.sh
if [ -n "${VENV:-}" ]; then PYTHON=$VENV/bin/python; fi
lines=$("${PYTHON:-python3}" -m megatron_r1 nodes "$RECIPE" --slots-per-node "${GPUS_PER_NODE:-8}" "$@")
declare -A jobs=()
while read -r name nodes needs; do
    if [ -n "${STAGES:-}" ] && [[ " $STAGES " != *" $name "* ]]; then
        continue
    fi
    after=''
    if [ "$needs" != - ]; then
        for need in ${needs//,/ }; do
            [ -z "${jobs[$need]:-}" ] || after=$after:${jobs[$need]}
        done
    fi
    jobs[$name]=$(STAGE=$name RECIPE=$RECIPE sbatch --parsable --job-name="$name" --nodes="$nodes" \
        --kill-on-invalid-dep=yes ${after:+--dependency=afterok$after} "$0" "$@")
    echo "$name: job ${jobs[$name]}, $nodes node(s)${after:+, after $after}"
done <<<"$lines"
