"""Sample a teacher and keep what a student should learn: tools/make_distill_set.py --model TEACHER --run-dir DIR ...

    tools/make_distill_set.py --model runs/r1/final_rl/policy --run-dir runs/distill_set \
        --data.files data/reasoning.jsonl --decontaminate data/aime_2024.jsonl

Rejection sampling as a pipeline's stage does it (docs/rejection.md); every field of RejectionConfig can be set. The
result, DIR/kept.jsonl, is what supervised fine-tuning reads.
"""

from __future__ import annotations

import signal
import sys

import tyro

from megatron_r1.errors import ConfigError, UserError
from megatron_r1.pipeline.folder import prepare_folder
from megatron_r1.pipeline.kinds import check, summary_of
from megatron_r1.stages.rejection.config import RejectionConfig


def main() -> int:
    # As an exception, so that servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    config = tyro.cli(RejectionConfig, description=__doc__)
    try:
        print(summary_of(config, check(config)), flush=True)
        from megatron_r1.stages.rejection.run import run_rejection

        with prepare_folder(config).lock:
            run_rejection(config)
    except UserError as error:
        print(f"make_distill_set: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
