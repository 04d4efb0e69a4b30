"""One Slurm for all tests here that need a real one, and a folder to submit from."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import one_machine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm() -> Iterator[one_machine.Slurm]:
    """Three nodes of two CPUs, all on loopback."""
    if reason := one_machine.missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="mr1-slurm-", ignore_cleanup_errors=True) as folder:
        found = one_machine.Slurm(Path(folder), nodes=3)
        try:
            found.start()
            yield found
        finally:
            found.stop()


@pytest.fixture(scope="session")
def submit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs are submitted: it sees the scripts as a checkout does."""
    folder = tmp_path_factory.mktemp("submit")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    return folder
