"""A model whose parts divide badly, into a server of two workers and another dtype. Oracle: transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from weight_sources import FolderSource

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.vllm.server import start_engines
from megatron_r1.engines.vllm.sync import WeightSync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
VOCABULARY = 30


def save_llama(folder: Path, seed: int) -> Path:
    """bf16: a tied head, one key-value head, and a vocabulary that vLLM fills up to 64 rows, 32 a worker: the second
    worker has none of the model's."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, num_key_value_heads=1, **shape)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)
    return folder


def logprobs(folder: Path, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits_TV = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    return logits_TV.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("way", ["gloo", "ipc"])
def test_what_is_pushed_is_served(way, config: RolloutConfig, tmp_path: Path):
    folders = [save_llama(tmp_path / f"model-{seed}", seed) for seed in range(3)]
    ids = np.random.default_rng(0).integers(3, VOCABULARY, 60).tolist()
    own = dataclasses.replace(config, sync=way, tensor_parallel=2, threads=1, check_tensors=100, vllm_args=())
    (engine,) = start_engines(own, model_path=folders[0], run_dir=tmp_path)
    with engine:
        np.testing.assert_allclose(engine.client.score(ids)[1:], logprobs(folders[0], ids), atol=1e-4)
        source = FolderSource(folders[1])
        assert {dtype for _, dtype, _ in source.metadata()} == {torch.bfloat16}
        sync = WeightSync(own, source=source, engines=(engine,), model_path=folders[0])
        for version, folder in enumerate(folders[1:], start=1):
            source.show(folder)
            sync.push(version)
            np.testing.assert_allclose(engine.client.score(ids)[1:], logprobs(folder, ids), atol=1e-4)
        sync.close()
