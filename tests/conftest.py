"""Makes importable what tests share, and the tools that they test; says which worker takes which files."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("ours", deadline=None)  # of one example: a busy machine's pause is no fault
hypothesis.settings.load_profile("ours")

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

SHARE_A_SERVER = tuple(
    f"engines/vllm/test_{name}.py" for name in ("auth", "client", "collect", "diagnose", "server", "sync")
)
LONGEST_FIRST = (
    "engines/vllm/test_reshard.py",
    *SHARE_A_SERVER,
    "pipeline/test_run.py",
    "pipeline/test_chain.py",
    "pipeline/test_rejection.py",
    "diagnose/test_families.py",
    "policy/test_checkpoint.py",
    "policy/test_layouts.py",
    "policy/test_activations.py",
    "weights/test_layouts.py",
    "policy/test_policy.py",
    "stages/test_reward_model.py",
)
"""Files that start several processes: one of two workers begins with the first of these (make test)."""
LONGEST_LAST = (
    "model/test_config_fields.py",
    "test_extending.py",
    "slurm/test_launch.py",
    "resharding/test_plan.py",
    "test_types.py",
)
"""Long files of one process at a time: the other worker begins with the last of these."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {TESTS / name: place - len(LONGEST_FIRST) for place, name in enumerate(LONGEST_FIRST)}
    last = {TESTS / name: place + 1 for place, name in enumerate(LONGEST_LAST)}
    items.sort(key=lambda item: first.get(item.path, last.get(item.path, 0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """--dist loadfile, in an order of ours: see OneForLong."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneForLong(LoadFileScheduling):
        """The first worker takes files from the front, the others from the end: beside tests of several processes run
        those of one, which often wait, and the short files in the middle are what is left when one has nothing to do.
        The files of SHARE_A_SERVER go to one worker, which starts their server once."""

        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "engines/vllm" if file.removeprefix("tests/") in SHARE_A_SERVER else file

        def _assign_work_unit(self, node: object) -> None:
            if node is not next(iter(self.assigned_work)):
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    return OneForLong(config, log)


def pytest_collection_finish() -> None:
    """What was imported stays: it need not be looked through for garbage again and again."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One core a worker: threads that wait for each other's turn burn processor time."""
    if "PYTEST_XDIST_WORKER" in os.environ and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def same_import_path() -> Iterator[None]:
    """Leaves sys.path as it was: from a folder that a test left there, the next test's workers would import."""
    before = list(sys.path)
    yield
    sys.path[:] = before
