"""pyright finds no fault. Among the tests, because it keeps one core busy for a minute, which others then need not wait
for. `make lint` runs it by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PYRIGHT = [sys.executable, "-m", "pyright"]


def pyright_starts() -> bool:
    """It needs node and an npm package, which the first start fetches where they are missing."""
    try:
        return subprocess.run([*PYRIGHT, "--version"], capture_output=True, check=False, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def test_types():
    if not pyright_starts():
        pytest.skip("pyright cannot start here (make lint says why)")
    command = [*PYRIGHT, "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
