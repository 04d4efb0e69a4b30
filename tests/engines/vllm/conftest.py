"""Tiny DeepSeek-V3 folders, transformers as the oracle, and one vLLM server shared by the session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from weight_sources import FolderSource

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.vllm.activations import RECORDER
from megatron_r1.engines.vllm.server import LocalEngine, start_engines
from megatron_r1.engines.vllm.sync import WeightSync

VOCABULARY = 128
MAX_MODEL_LEN = 384
EOS = 1


class Oracle:
    """Log probabilities by transformers, in fp32, of the weights in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logprobs(self, token_ids: list[int], temperature: float = 1.0) -> np.ndarray:
        with torch.no_grad():
            logits_TV = self.model(torch.tensor([token_ids])).logits[0] / temperature
        logprobs_TV = logits_TV.log_softmax(-1)
        tail = logprobs_TV[:-1].gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]
        return np.concatenate([[0.0], tail.numpy()]).astype(np.float32)

    def likeliest(self, token_ids: list[int]) -> int:
        with torch.no_grad():
            return int(self.model(torch.tensor([token_ids])).logits[0, -1].argmax())


def save_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A random DeepSeek-V3 of about 0.2M parameters whose router, groups and bias all matter."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=0,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = DeepseekV3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.data = torch.randn(8) * 0.1
    model.to(dtype).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    (folder / "config.json").write_text(json.dumps(fields))
    words = {"<s>": 0, "</s>": EOS, "<unk>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one shape with different weights; servers start from the first."""
    root = tmp_path_factory.mktemp("models")
    return [save_model(root / f"model-{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="session")
def oracles(folders: list[Path]) -> list[Oracle]:
    return [Oracle(folder) for folder in folders]


@pytest.fixture(scope="session")
def config() -> RolloutConfig:
    return RolloutConfig(
        device="cpu",
        dtype="fp32",
        sync="gloo",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=64,
        kv_cache_gib=0.125,
        sync_bucket_mib=1,
        start_timeout_seconds=600.0,
        stall_seconds=120.0,
        vllm_args=(f"worker-extension-cls={RECORDER}",),
    )


@pytest.fixture(scope="session")
def engine(
    config: RolloutConfig, folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalEngine]:
    """A running server that started from folders[0]."""
    (engine,) = start_engines(config, model_path=folders[0], run_dir=tmp_path_factory.mktemp("run"))
    with engine:
        yield engine


@pytest.fixture(scope="session")
def fresh_scores(engine: LocalEngine) -> np.ndarray:
    """What a server says of `prompt(100, 7)` before any weight was pushed to it (ask for it before
    pushing).
    """
    assert engine.client.weight_version() == 0
    return engine.client.score(prompt(100, 7))


@pytest.fixture(scope="session")
def weights(folders: list[Path]) -> FolderSource:
    return FolderSource(folders[0])


@pytest.fixture(scope="session")
def sync(
    config: RolloutConfig, engine: LocalEngine, weights: FolderSource, folders: list[Path], fresh_scores: np.ndarray
) -> Iterator[WeightSync]:
    sync = WeightSync(config, source=weights, engines=(engine,), model_path=folders[0])
    yield sync
    sync.close()
