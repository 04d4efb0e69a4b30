"""Tests of what only GPUs reach, where there is none: Transformer Engine is installed, its kernels cannot run."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def transformer_engine() -> None:
    try:
        version("transformer-engine-torch")  # its library lies where no import of this name finds it
    except PackageNotFoundError:
        pytest.skip("needs Transformer Engine for PyTorch: make test-gpu-paths")


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory) -> Path:
    """A folder with a libcuda.so.1 whose functions say that there is no device, so that vLLM's libraries load."""
    try:
        version("vllm")
    except PackageNotFoundError:
        pytest.skip("needs vLLM's CUDA build: make test-gpu-paths")
    (package,) = find_spec("vllm").submodule_search_locations or ()
    wanted = set()
    for library in Path(package).glob("*.so"):
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        wanted |= {line.split()[-1] for line in listed.stdout.splitlines() if re.match(r"cu[A-Z]", line.split()[-1])}
    folder = tmp_path_factory.mktemp("libcuda")
    source = "".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(wanted))  # CUDA_ERROR_NO_DEVICE
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, input=source, text=True, check=True)
    return folder
