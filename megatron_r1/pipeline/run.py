"""Run one stage: as the process that starts the others, or as one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import PREEMPTED, PreemptedError
from megatron_r1.observe.report import write_report
from megatron_r1.pipeline.folder import is_finished, prepare_folder
from megatron_r1.pipeline.kinds import check, kind_of, loop_of, needs_of
from megatron_r1.pipeline.launch import PARENT_VARIABLE, launch_local, obey_launcher, ranks_of
from megatron_r1.pipeline.options import words_after_move


def run_stage(config: StageConfig, words: Sequence[str]) -> int:
    """Make the stage's folder and run `megatron-r1 run WORDS` as its processes. Returns the exit status."""
    if is_finished(config):
        print(f"{config.run_dir} is finished: nothing to do{_report_of(config)}", flush=True)
        return 0
    prepared = prepare_folder(config)
    with prepared.lock:
        if prepared.moved is not None:
            print(f"the earlier run was moved to {prepared.moved}", flush=True)
            words = words_after_move(words, config.run_dir, prepared.moved)
        return launch_local(config.run_dir, words, ranks_of(needs_of(config)))


def _report_of(config: StageConfig) -> str:
    """Says where its report is, which a run that was killed as it ended may not have written."""
    if not kind_of(config).report:
        return ""
    report = config.run_dir / "report.html"
    return f"; report: {report if report.exists() else write_report(config.run_dir)}"


def run_here(config: StageConfig) -> int:
    """Run the stage in this process, which is one of its ranks (RANK is set). Returns the exit status."""
    # The folder is made once: by the parent that started this rank, or by rank 0, which alone looks whether it may.
    outer = PARENT_VARIABLE not in os.environ
    shape = check(config, folder=os.environ["RANK"] == "0" and outer)
    if needs_of(config).trainer is None:
        if not outer:
            return _run_alone(config)
        if os.environ["RANK"] != "0":  # one process does it all
            return 0
        with prepare_folder(config).lock:
            return _run_alone(config)
    from megatron_r1.pipeline.worker import run_rank

    return run_rank(config, shape)  # pyright: ignore[reportArgumentType] - it has ranks, so a model


def _run_alone(config: StageConfig) -> int:
    """Run a stage without a trainer, whose only process this is. Its errors are the command line's to print."""
    obey_launcher()
    try:
        loop_of(config)(config)
    except PreemptedError as stop:
        print(f"megatron-r1: {stop}", file=sys.stderr)
        return PREEMPTED
    return 0
