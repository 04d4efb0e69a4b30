"""Make the environment for NVIDIA GPUs (make install-gpu): CUDA 13, Transformer Engine, vLLM, Megatron-Core.

Everything but one package comes as wheels, at the versions of a lock file (requirements/gpu*.txt). Transformer Engine's
torch extension has no wheel on PyPI: it is compiled here against the torch that was just installed, with the CUDA
compiler and headers that came as wheels too, so no CUDA toolkit is needed; its wheel is kept and used again. Neither
needs a GPU: a login node or a container's build will do. Standard library only.

Optional, because Transformer Engine brings its own attention (cuDNN's) and optimizer: flash-attn (--flash-attn) is
compiled too, which takes long. apex on PyPI is another project: NVIDIA's is built from its repository
(docs/gpu.md), found if it is there, and never needed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from check_machine import disk_faults, platform_faults

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"0.32": ROOT / "requirements" / "gpu.txt", "0.33": ROOT / "requirements" / "gpu-vllm-0.33.txt"}
"""By vLLM's version."""
UV = "uv==0.13.8"
COMPILED = "transformer-engine-torch"
FLASH_ATTN = "flash-attn==2.8.3.post2"
DISK_GIB = 25
"""Of which 10 stay: wheels are unpacked and, without a shared cache, downloaded to the same disk."""
BUILD_GIB = 3
"""Memory of one compiler process."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-gpu", help="where to make it (default .venv-gpu)")
    parser.add_argument("--vllm", choices=sorted(LOCKS), default="0.32", help="which lock file (default 0.32)")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "gpu-wheels", help="keeps what is compiled")
    parser.add_argument("--flash-attn", action="store_true", help="compile flash-attn too")
    parser.add_argument("--jobs", type=int, default=0, help="compilers at once (default: cores, and memory for each)")
    parser.add_argument("--check", action="store_true", help="only say what is missing on this machine")
    options = parser.parse_args()
    faults = machine_faults(options.venv)
    for fault in faults:
        print(f"install_gpu: {fault}", file=sys.stderr)
    if faults or options.check:
        return int(bool(faults))
    try:
        install(options.venv.resolve(), LOCKS[options.vllm], options)
    except subprocess.CalledProcessError as error:
        print(f"install_gpu: {' '.join(map(str, error.cmd[:6]))} ... failed ({error.returncode})", file=sys.stderr)
        return 1
    return 0


def machine_faults(venv: Path) -> list[str]:
    """What this machine lacks, one sentence each with its remedy."""
    faults = platform_faults(platform.system(), platform.machine())
    if sys.version_info[:2] != (3, 12):
        found = ".".join(map(str, sys.version_info[:2]))
        faults.append(f"this is Python {found}; the lock files are for 3.12: make install-gpu PYTHON=python3.12")
    elif not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        faults.append("Python.h is missing, which the extension is compiled with: apt-get install python3.12-dev")
    if shutil.which("g++") is None:
        faults.append("g++ is missing, which the extension is compiled with: apt-get install g++")
    place = venv.absolute()
    while not place.exists():
        place = place.parent
    if not (venv / "bin" / "python").exists():
        faults += disk_faults(shutil.disk_usage(place).free, DISK_GIB, str(place))
    return faults


def install(venv: Path, lock: Path, options: argparse.Namespace) -> None:
    """All steps; those that are done already cost seconds."""
    python = venv / "bin" / "python"
    if not python.exists():
        say(f"making {venv}")
        run([sys.executable, "-m", "venv", venv])
    run([python, "-m", "pip", "install", "-qq", UV])
    wheels = [line for line in lock.read_text().splitlines() if not line.startswith(("#", f"{COMPILED}=="))]
    say(f"installing {len(wheels)} packages of {lock.name} (5 GB to download, 10 GB on disk)")
    uv_install(python, "-r", "-", text="\n".join(wheels))
    torch = version_in(lock, "torch")
    folder = options.wheels / f"torch-{torch}"
    build(python, f"{COMPILED}=={version_in(lock, COMPILED)}", folder, options.jobs)
    if options.flash_attn:
        build(python, FLASH_ATTN, folder, options.jobs)
    uv_install(python, "--no-build-isolation", "-e", ROOT)
    run([python, "-W", "ignore", "-c", CHECK], environment=build_environment(python, 1))
    say(f"done: {venv}/bin/megatron-r1 doctor says what this machine has")


CHECK = """
import importlib.metadata as metadata, torch, megatron.core, transformer_engine.pytorch, vllm
for name in ("torch", "megatron-core", "transformer-engine", "vllm"):
    print(f"install_gpu: {name} {metadata.version(name)}")
"""


def build(python: Path, requirement: str, folder: Path, jobs: int) -> None:
    """Compile `requirement` against the installed torch, unless its wheel is in `folder`, and install it."""
    name, _, version = requirement.partition("==")
    form = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(form)):
        jobs = jobs or parallel_jobs()
        say(f"compiling {requirement} ({jobs} at once; this takes many minutes)")
        folder.mkdir(parents=True, exist_ok=True)
        command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        # pip would otherwise take a wheel that it built before, for another torch.
        run([*command, "--no-cache-dir", requirement, "-w", folder], environment=build_environment(python, jobs))
    (wheel,) = list(folder.glob(form))
    uv_install(python, wheel)


def build_environment(python: Path, jobs: int) -> dict[str, str]:
    """Compilers and headers are those of the installed CUDA wheels, so that they fit torch."""
    packages = python.parent.parent / "lib" / "python3.12" / "site-packages"
    cuda = packages / "nvidia" / "cu13"
    includes = [cuda / "include", cuda / "include" / "cccl"]
    includes += [packages / "nvidia" / name / "include" for name in ("cudnn", "nccl", "nvshmem")]
    return {
        **os.environ,
        "CUDA_HOME": str(cuda),
        "PATH": f"{cuda / 'bin'}:{python.parent}:{os.environ.get('PATH', '')}",
        "CPATH": ":".join(str(include) for include in includes if include.is_dir()),
        "NVTE_FRAMEWORK": "pytorch",
        "MAX_JOBS": str(jobs),
    }


def parallel_jobs() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / BUILD_GIB)))


def uv_install(python: Path, *words: object, text: str | None = None) -> None:
    """Install exactly what is named; all needs of it are in the lock file."""
    run([python, "-m", "uv", "pip", "install", "-q", "--python", python, "--no-deps", *words], text)


def version_in(lock: Path, name: str) -> str:
    """The version that a lock file pins. KeyError if it does not name the package."""
    pins = dict(line.split("==", 1) for line in lock.read_text().splitlines() if "==" in line and line[0] != "#")
    return pins[name]


def run(command: Sequence[object], text: str | None = None, *, environment: Mapping[str, str] | None = None) -> None:
    """Raises CalledProcessError."""
    subprocess.run([str(word) for word in command], check=True, input=text, text=True, env=environment)


def say(text: str) -> None:
    print(f"install_gpu: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
