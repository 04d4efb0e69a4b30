"""Start one process a rank on this machine: torchrun, but with nothing listening on a port.

torchrun's usual rendezvous is a TCP store that any user of the machine may connect to. Here the rendezvous is a file in
the run's own folder, and gloo's sockets stay on the loopback device. Under an outer torchrun it is not used.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence

from megatron_r1.config.schema import RunConfig


def launch_local(config: RunConfig, words: Sequence[str]) -> int:
    """Run `megatron-r1 run WORDS` as config.parallel.world_size ranks and wait. Returns the exit status."""
    private = config.run_dir / ".rendezvous"
    private.mkdir(mode=0o700)
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": str(config.train.threads_per_rank),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore",
        # glibc otherwise returns large tensors to the kernel and pays page faults for them at every step.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    }
    if config.rollout.device == "cpu":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    run_id = uuid.uuid4().hex
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1"]
    command += [f"--nproc-per-node={config.parallel.world_size}", "--rdzv-backend=c10d", f"--rdzv-id={run_id}"]
    command += [f"--rdzv-endpoint={private / 'agent'}", "--rdzv-conf=store_type=file", "--max-restarts=0"]
    command += ["-m", "megatron_r1", "run", *words]
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        return process.wait()
