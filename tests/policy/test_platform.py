"""What a process is told before Megatron is imported: deterministic algorithms of every library, or none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from ranks import run_ranks

from megatron_r1.recipes.tiny import TINY_V3

VARIABLES = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
SCRIPT = """
import json, os, torch
from megatron_r1.errors import ConfigError
from megatron_r1.policy.platform import configure_process
try:
    configure_process(threads=1, cpu=False, deterministic={deterministic})
    refused = None
except ConfigError as error:
    [refused] = error.faults
print(json.dumps([refused, torch.are_deterministic_algorithms_enabled(), [os.environ.get(name) for name in {names}]]))
"""


def configured(deterministic: bool, **given: str) -> list:
    """[what it was refused with, whether torch is deterministic, the values of VARIABLES] in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | given
    script = SCRIPT.format(deterministic=deterministic, names=VARIABLES)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_deterministic_mode_tells_every_library():
    assert configured(True) == [None, True, ["0", ":4096:8", "Ring"]]


@pytest.mark.slow
def test_other_runs_are_told_nothing():
    assert configured(False) == [None, False, [None, None, None]]


@pytest.mark.slow
def test_a_deterministic_choice_of_the_site_stays():
    assert configured(True, NCCL_ALGO="Ring,CollnetDirect", CUBLAS_WORKSPACE_CONFIG=":16:8") == [
        None,
        True,
        ["0", ":16:8", "Ring,CollnetDirect"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"), [("NCCL_ALGO", "Tree"), ("NCCL_ALGO", "Ring,Tree"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")]
)
def test_another_choice_is_refused_in_one_line(name, value):
    refused, torch_is, _ = configured(True, **{name: value})
    assert f"environment's {name} is {value}" in refused and f"unset {name}" in refused
    assert "\n" not in refused and not torch_is


def test_training_runs_and_gives_the_same_bits(tmp_path):
    (tmp_path / "config.json").write_bytes((TINY_V3 / "config.json").read_bytes())
    run_ranks("deterministic.py", str(tmp_path), ranks=1, shared=False)
    found = dict(np.load(tmp_path / "found.npz"))
    names = [name.removeprefix("first ") for name in found if name.startswith("first ")]
    assert len(names) > 100
    for name in names:
        np.testing.assert_array_equal(found[f"first {name}"], found[f"second {name}"], err_msg=name)
