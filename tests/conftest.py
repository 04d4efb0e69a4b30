"""Makes tests/ importable for the shared oracles and the rank launcher; puts the longest files first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("ours", deadline=None)  # of one example: a busy machine's pause is no fault
hypothesis.settings.load_profile("ours")

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

LONGEST_FIRST = (
    "pipeline/test_run.py",
    "engines/vllm/test_sync_layouts.py",
    "pipeline/test_chain.py",
    "engines/vllm/test_auth.py",
    "engines/vllm/test_client.py",
    "engines/vllm/test_collect.py",
    "engines/vllm/test_server.py",
    "engines/vllm/test_sync.py",
    "pipeline/test_rejection.py",
    "stages/test_reward_model.py",
    "policy/test_policy.py",
    "policy/test_checkpoint.py",
    "policy/test_layouts.py",
    "model/test_config_fields.py",
    "weights/test_layouts.py",
)
"""Two workers take whole files in this order (make test): a long one that came last would leave one of them idle.
Those that share a server (engines/vllm/) stand together, so that one worker gets them all and starts it once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def same_import_path() -> Iterator[None]:
    """Leaves sys.path as it was: from a folder that a test left there, the next test's workers would import."""
    before = list(sys.path)
    yield
    sys.path[:] = before
