#!/usr/bin/env bash
# All of DeepSeek-R1's stages at toy size, from a base model to a distilled student, on two CPU cores.
#
#   examples/r1_tiny.sh                          everything (a quarter of an hour)
#   examples/r1_tiny.sh --until rejection        up to a stage; the same command goes on later
#   examples/r1_tiny.sh --only final_rl          one stage, whose inputs are there
#   examples/r1_tiny.sh --dry-run                check and print every stage's configuration
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if [[ ! -x $python || -e .venv/.installing ]]; then
    make install
fi
exec "$python" -m megatron_r1 run r1_tiny "$@"
