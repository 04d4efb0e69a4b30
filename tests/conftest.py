"""Makes tests/ importable for the shared oracles and the rank launcher; puts the longest files first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("ours", deadline=None)  # of one example: a busy machine's pause is no fault
hypothesis.settings.load_profile("ours")

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

SHARE_A_SERVER = tuple(f"engines/vllm/test_{name}.py" for name in ("auth", "client", "collect", "server", "sync"))
LONGEST_FIRST = (
    "engines/vllm/test_reshard.py",
    "pipeline/test_run.py",
    "test_types.py",
    *SHARE_A_SERVER,
    "engines/vllm/test_sync_layouts.py",
    "pipeline/test_chain.py",
    "pipeline/test_rejection.py",
    "resharding/test_plan.py",
    "slurm/test_launch.py",
    "policy/test_checkpoint.py",
    "policy/test_layouts.py",
    "weights/test_layouts.py",
    "weights/test_verify.py",
    "stages/test_reward_model.py",
    "model/test_config_fields.py",
    "test_extending.py",
)
"""Two workers take whole files in this order (make test): a long one that came last would leave one of them idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """--dist loadfile, but that the files of SHARE_A_SERVER go to one worker, which starts their server once."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "engines/vllm" if file.removeprefix("tests/") in SHARE_A_SERVER else file

    return ByServer(config, log)


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
