"""Start a worker script on n gloo ranks with torchrun, as the multi-rank tests do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent


def run_ranks(script: str, *arguments: str, ranks: int, timeout_seconds: float = 300.0) -> str:
    """Run tests/workers/SCRIPT under torchrun with `ranks` processes; returns its output. Fails with the output's end
    if a rank fails. The rendezvous is a file, so tests beside each other need no ports."""
    with tempfile.TemporaryDirectory() as private:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={private}/agent", "--rdzv-conf=store_type=file"]
        command += [f"--rdzv-id={os.getpid()}-{ranks}", str(TESTS / "workers" / script), f"{private}/store", *arguments]
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{script} on {ranks} rank(s) ended with {done.returncode}:\n{output[-6000:]}"
    return output
