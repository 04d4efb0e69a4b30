"""The process that talks to Weights & Biases for a run: `python -m megatron_r1.observe.trackers.wandb_process`.

Reads lines of JSON: first what wandb.init is given, then a step's numbers each. Writes {"url": ...} once it has begun,
or {"error": ...} and ends. After the last line it has FINISH_SECONDS to upload, then it ends with what it has started:
also when the run was killed, since that ends the lines too.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from typing import Any

INIT_SECONDS = 60.0
FINISH_SECONDS = 60.0
"""What is not uploaded then stays in run_dir/wandb for `wandb sync`."""
ERROR_SECONDS = 5.0
"""The same after an error."""
LATE = 3


def main() -> None:
    rows: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(rows,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what wandb prints goes to the log
    status = 1
    try:
        settings = rows.get()
        if settings is not None:
            _follow(settings, rows, answers)
        status = 0
    except BaseException as error:  # whatever the library raises, the run is told
        lines = str(error).strip().splitlines()
        answers.write(json.dumps({"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}) + "\n")
        print(repr(error), file=sys.stderr, flush=True)
        threading.Timer(ERROR_SECONDS, _end, (status,)).start()
    try:
        _flush()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    _end(status)  # not by the way of the library's exit hooks, which would wait for its uploader for ever


def _follow(settings: dict[str, Any], rows: queue.Queue[dict[str, Any] | None], answers: Any) -> None:
    import wandb

    run = wandb.init(
        **settings,
        resume="allow",
        # Numbers and the configuration only: neither output nor source is sent.
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        ),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    answers.write(json.dumps({"url": run.url}) + "\n")
    while (row := rows.get()) is not None:
        run.log(row)
    run.finish()


def _flush() -> None:
    """Offline, finish() comes back before the file is written; the end of the service does not."""
    import wandb

    wandb.teardown()


def _read(rows: queue.Queue[dict[str, Any] | None]) -> None:
    """Read on whatever the library does, so that the run never waits."""
    for line in sys.stdin.buffer:
        rows.put(json.loads(line))
    rows.put(None)
    time.sleep(FINISH_SECONDS + 5)
    _end(LATE)


def _end(status: int) -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(status)


if __name__ == "__main__":
    main()
