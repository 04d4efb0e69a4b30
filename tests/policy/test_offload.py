"""A policy whose memory went to the host and back trains on as if it had not, bit for bit."""

from __future__ import annotations

import pytest
from ranks import run_ranks


@pytest.mark.slow
def test_offloaded_training_equals_training(tmp_path):
    run_ranks("offload.py", str(tmp_path), ranks=2, timeout_seconds=300)


def test_memory_that_does_not_come_back_is_said_and_can_be_asked_for_again(tmp_path, monkeypatch):
    # So that what is given back leaves the process, and what is taken comes from outside.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    run_ranks("offload_memory.py", str(tmp_path), ranks=1, timeout_seconds=200, shared=False)
