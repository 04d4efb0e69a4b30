"""Each FP8 recipe through Megatron into Transformer Engine: the context opens, with what docs/fp8.md says of it."""

from __future__ import annotations

import json

import pytest
from ranks import run_ranks

from megatron_r1.recipes.tiny import TINY_V3

pytestmark = pytest.mark.gpu_paths
RECIPES = {
    "blockwise": ("Float8BlockScaling E4M3 False", 9),
    "tensorwise": ("Float8CurrentScaling E4M3 False", 9),
    "delayed": ("TEDelayedScaling E4M3 False", 9),
    "mxfp8": ("MXFP8BlockScaling E4M3 False", 10),
}


@pytest.fixture(scope="module")
def folder(transformer_engine, tmp_path_factory):
    made = tmp_path_factory.mktemp("fp8_contexts")
    (made / "config.json").write_bytes((TINY_V3 / "config.json").read_bytes())
    for gpu in (9, 10):  # a process asks its GPU once
        jobs = [f"{name}:{major}" for name, (_, major) in RECIPES.items() if major == gpu]
        run_ranks("fp8_contexts.py", str(made), *jobs, ranks=1, shared=False)
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_context_opens_for_the_layers_that_are_in_fp8(folder, recipe):
    found = json.loads((folder / f"{recipe}.json").read_text())
    layers = json.loads((TINY_V3 / "config.json").read_text())["num_hidden_layers"]
    expected = [RECIPES[recipe][0]] * layers
    if recipe != "delayed":  # which keeps none in bf16
        expected[0] = expected[-1] = ""
    assert found["layers"] == expected
    assert not found["outside"]
    assert found["parameters"] == ["torch.bfloat16", "torch.float32"]  # router biases are in fp32
