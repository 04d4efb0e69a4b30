"""A real Slurm whose nodes are all this machine: munged, slurmctld and N slurmd on loopback, without systemd.

As root, because slurmd starts jobs as their users. Everything it writes is in one folder; `stop` ends what was started.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")

GOING_ON = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED")
"""States of a job that has not ended for good."""

CONFIGURATION = """\
ClusterName=one
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/state/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=20
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
NodeName=node[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 Boards=1 \
SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str:
    """Why no Slurm can be started here; empty if one can."""
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "slurmd and munged are started by hand here, which takes root"


class Slurm:
    """`environment`: for the commands of this Slurm."""

    def __init__(self, folder: Path, *, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        # Otherwise an allocation that the tests run in would leak into the jobs.
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_", "MEGATRON_R1_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]

    def start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        folder.chmod(0o755)
        port = free_range(1 + self.nodes)
        text = CONFIGURATION.format(folder=folder, port=port, nodes=self.nodes, first=port + 1, last=port + self.nodes)
        (folder / "slurm.conf").write_text(text)
        self.run(
            "munged", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed",
        )  # fmt: skip
        self.run("slurmctld", "-i")
        for node in range(1, self.nodes + 1):
            (folder / "state" / f"node{node}").mkdir()
            self.run("slurmd", "-N", f"node{node}")
        deadline = time.monotonic() + 30
        while self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != str(self.nodes):
            if time.monotonic() > deadline:
                raise RuntimeError(f"slurm did not come up: {(folder / 'slurmctld.log').read_text()[-2000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End the jobs, then the daemons, which could not end a job's processes any more."""
        self.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for file in self.folder.glob("*.pid"):
                try:
                    os.kill(int(file.read_text()), number)
                except (ProcessLookupError, ValueError, FileNotFoundError):
                    continue
            time.sleep(1.0)

    def run(self, *words: object, check: bool = True, **settings: str) -> str:
        """The output of a command of this Slurm."""
        environment = self.environment | settings
        command = [str(word) for word in words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields that scontrol shows of a job."""
        words = self.run("scontrol", "show", "job", number, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *, seconds: float = 300.0) -> dict[str, str]:
        """The job's fields once it has ended."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] in GOING_ON:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is still {job['JobState']} ({job['Reason']})")
            time.sleep(0.5)
        return job


def free_range(count: int) -> int:
    """The first of `count` neighbouring TCP ports of loopback that are free now."""
    for first in range(21000, 32000, count + 1):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for opened in sockets:
                opened.close()
    raise RuntimeError("no free ports")
