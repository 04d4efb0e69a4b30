"""Tests that need a GPU, in the order in which half an hour with one is best spent; their figures become a page.

`make test-gpu` writes docs/gpu_results.md, also when a test failed. With GPU_TESTS_ON_CPU=1 they run on the CPU, small,
to try the tests themselves; the page goes to build/ then, and proves nothing about a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_report import Report, commit_of, describe_machine

from megatron_r1.config.packages import has_module

ROOT = Path(__file__).parents[2]
ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"
ORDER = (
    "test_step.py",
    "test_weight_sync.py",
    "test_bf16_moments.py",
    "test_fp8_training.py",
    "test_head.py",
    "test_throughput.py",
)
REPORT = Report()
MISSING: list[str] = []
"""Tests that were not asked for, such as by -k."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(ORDER)}
    own = sorted((item for item in items if item.path in places), key=lambda item: places[item.path])
    items[:] = [item for item in items if item.path not in places] + own


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    result = yield
    if result.when == "call" or result.outcome != "passed":
        why = result.longrepr[2] if isinstance(result.longrepr, tuple) else str(result.longrepr or "").split("\n")[-1]
        REPORT.outcomes.append((item.name, result.outcome, result.duration, why))
    return result


def pytest_deselected(items: list[pytest.Item]) -> None:
    MISSING.extend(item.name for item in items if item.path.parent == Path(__file__).parent)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A part of the tests, or of them what had run when they were stopped, does not replace the whole page."""
    if not (torch.cuda.is_available() or ON_CPU) or not REPORT.outcomes:
        return
    whole = not MISSING and len(REPORT.outcomes) >= session.testscollected
    place = "build/gpu_results_of_a_cpu.md" if ON_CPU else "docs/gpu_results.md"
    page = ROOT / (place if whole or ON_CPU else "build/gpu_results_of_a_part.md")
    page.parent.mkdir(exist_ok=True)
    command = f"pytest {' '.join(session.config.invocation_params.args)}"
    page.write_text(
        REPORT.markdown(command=command, commit=commit_of(ROOT), machine=describe_machine()), encoding="utf-8"
    )
    print(f"\nwrote {page}")


@pytest.fixture(scope="session")
def device() -> str:
    """cuda; skipped where there is none."""
    if ON_CPU:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    return "cuda"


@pytest.fixture(scope="session")
def vllm(device: str) -> None:
    if not has_module("vllm"):
        pytest.skip("needs vLLM: make install-gpu")


@pytest.fixture(scope="session")
def fp8(device: str) -> None:
    if device == "cpu":
        pytest.skip("FP8 is a GPU's")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"needs an H100 or newer for blockwise FP8; this is {torch.cuda.get_device_name()}")
    if not has_module("transformer_engine"):
        pytest.skip("needs Transformer Engine: make install-gpu")


@pytest.fixture
def report() -> Report:
    return REPORT


@pytest.fixture
def tool(tmp_path: Path, report: Report) -> Callable[..., Any]:
    """tool(title, NAME, *words): runs tools/NAME.py, puts what it prints into the page, returns its --json."""

    def run(title: str, name: str, *words: object) -> Any:
        out = tmp_path / f"{name}.json"
        command = [sys.executable, ROOT / "tools" / f"{name}.py", *words]
        environment = dict(os.environ) | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(
            [str(word) for word in [*command, "--json", out]], capture_output=True, text=True, check=False,
            env=environment,
        )  # fmt: skip
        shown = " ".join(str(word).removeprefix(f"{ROOT}/") for word in command[1:])
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        report.add(title, f"    {shown}\n\n{done.stdout}")
        return json.loads(out.read_text(encoding="utf-8"))

    return run
