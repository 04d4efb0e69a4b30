"""Tests of what only GPUs reach, where there is none: Transformer Engine is installed, its kernels cannot run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest


@pytest.fixture(scope="session")
def transformer_engine() -> None:
    try:
        version("transformer-engine-torch")  # its library lies where no import of this name finds it
    except PackageNotFoundError:
        pytest.skip("needs Transformer Engine for PyTorch: pip install -e '.[gpu]' in a CUDA environment")
