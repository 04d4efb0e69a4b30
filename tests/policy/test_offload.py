"""A policy whose memory went to the host and back trains on as if it had not, bit for bit."""

from __future__ import annotations

import pytest
from ranks import run_ranks


@pytest.mark.slow
def test_offloaded_training_equals_training(tmp_path):
    run_ranks("offload.py", str(tmp_path), ranks=2, timeout_seconds=300)
