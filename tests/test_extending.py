"""docs/extending.md, run as it is written, from a folder outside the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.algorithms import algorithm_named

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.partition(f"## {title}\n")[2], flags=re.M)[0]


def code_of(title: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", section(title), flags=re.S)
    return code


def command_of(title: str) -> list[str]:
    (line,) = re.findall(r"^    megatron-r1 (.*)$", section(title), flags=re.M)
    return line.split()


@pytest.fixture
def outside(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry_run(words: list[str], folder: Path) -> str:
    command = [sys.executable, "-m", "megatron_r1", *words, "--dry-run", "--run-dir", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_algorithm(outside):
    (outside / "rloo.py").write_text(code_of("An algorithm"))
    out = dry_run(command_of("An algorithm"), outside)
    assert "algorithm.scale = 0.5" in out
    algorithm = algorithm_named("rloo.py:RLOO")
    # The others' means are 1, 2 and 1.5.
    assert algorithm.advantages(np.array([2.0, 0.0, 1.0])) == pytest.approx([1.5, -1.5, 0.0])


@pytest.mark.slow
def test_an_algorithm_of_ones_own_trains(outside):
    """Three steps of the quickstart on every rank, from the run's launcher to its report."""
    (outside / "rloo.py").write_text(code_of("An algorithm"))
    words = [*command_of("An algorithm"), "--grpo.steps", "3", "--sft.steps", "40", "--run-dir", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1", *words], capture_output=True, text=True, check=False, cwd=outside
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"name": "rloo:RLOO"' in (outside / "run" / "run.json").read_text()
    assert len((outside / "run" / "metrics.jsonl").read_text().splitlines()) == 3
