#!/usr/bin/env bash
# R1-Zero GRPO on a real pretrained model, SmolLM2-135M-Instruct, on two CPU cores.
#
#   examples/grpo_smollm2.sh                     the recipe as it is
#   examples/grpo_smollm2.sh --grpo.steps 50     any field can be set; --dry-run shows them all
#
# Installs into .venv if that is absent and makes the model's folder if that is absent (less than a minute, once).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if [[ ! -x $python || -e .venv/.installing ]]; then
    make install
fi
"$python" tools/make_smollm2.py runs/models/smollm2-135m-instruct
exec "$python" -m megatron_r1 run grpo_smollm2 "$@"
