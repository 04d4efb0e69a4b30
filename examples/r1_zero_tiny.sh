#!/usr/bin/env bash
# The pure-RL branch at toy size: GRPO with rule rewards on a base model, on two CPU cores.
#
#   examples/r1_zero_tiny.sh [--zero-rl.steps 60]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if [[ ! -x $python || -e .venv/.installing ]]; then
    make install
fi
exec "$python" -m megatron_r1 run r1_zero_tiny "$@"
