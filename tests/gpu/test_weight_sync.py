"""On a GPU: weights that were pushed are served, bit for bit those of a fresh server; a sleeping one gives memory back.

Oracles: transformers in fp32, and vLLM started fresh (its logprobs, and its own checksums of all weights). A dense
model, and a DeepSeek-V3 with the head sizes that vLLM's MLA kernels take. The same on CPUs: tests/engines/vllm.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from weight_sources import FolderSource

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.engines.vllm.server import LocalEngine, start_engines
from megatron_r1.engines.vllm.sync import WeightSync

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
VOCABULARY = 512
WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
BF16_LOGPROB = 0.1
"""Largest difference of a logprob in bf16 from transformers' in fp32, for these widths."""


def dense():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**WIDTHS, num_attention_heads=4, max_position_embeddings=1024))


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **WIDTHS,
            num_attention_heads=16, num_key_value_heads=16, q_lora_rank=128, kv_lora_rank=512, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, moe_intermediate_size=128, n_routed_experts=8, num_experts_per_tok=4,
            n_shared_experts=1, n_group=4, topk_group=2, first_k_dense_replace=1, max_position_embeddings=1024,
        )
    )  # fmt: skip
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.data = torch.randn(8) * 0.1
    return model


def save(folder: Path, make: Callable[[], torch.nn.Module], seed: int) -> Path:
    """A random model whose matrices are large enough to tell right from wrong, and a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(seed)
    model = make()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    fields = json.loads((folder / "config.json").read_text())
    if fields["model_type"] == "deepseek_v3":  # transformers 5 leaves out what vLLM goes by
        fields |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        (folder / "config.json").write_text(json.dumps(fields))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)
    return folder


def expected(folder: Path, ids: list[int]) -> np.ndarray:
    """Logprobs by transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return np.concatenate([[0.0], logprobs_TV[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()])


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()


def checksums(engine: LocalEngine) -> dict[str, str]:
    """vLLM's own, of each parameter of each worker."""
    return engine.client.request("POST", "/weight_checker", {"action": "checksum"})["checksums"]


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture(scope="module", params=[dense, deepseek])
def folders(request, vllm, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save(root / f"model-{seed}", request.param, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def config(device, vllm) -> RolloutConfig:
    return RolloutConfig(
        device=device, dtype="bf16", sync="ipc", sleep_level=2, max_model_len=512, sync_bucket_mib=1,
        memory_fraction=0.3, kv_cache_gib=0.25, sampling=SamplingConfig(max_new_tokens=8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(config, folders, tmp_path_factory) -> Iterator[LocalEngine]:
    (engine,) = start_engines(config, model_path=folders[0], run_dir=tmp_path_factory.mktemp("run"))
    with engine:
        yield engine


def test_a_push_is_served_and_a_sleeping_server_gives_memory_back(engine, folders, device, report):
    ids = tokens(200, 3)
    np.testing.assert_allclose(engine.client.score(ids), expected(folders[0], ids), atol=BF16_LOGPROB)
    sync = WeightSync(engine.config, source=FolderSource(folders[1], device), engines=(engine,), model_path=folders[0])
    sync.push(1)
    np.testing.assert_allclose(engine.client.score(ids), expected(folders[1], ids), atol=BF16_LOGPROB)
    before = checksums(engine)
    awake = used_bytes() if device == "cuda" else 0
    engine.client.sleep(2)
    asleep = used_bytes() if device == "cuda" else 0
    engine.client.wake("weights")
    sync.push(2)
    engine.client.wake("kv_cache")
    sync.close()
    assert checksums(engine) == before
    np.testing.assert_allclose(engine.client.score(ids), expected(folders[1], ids), atol=BF16_LOGPROB)
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        report.add("Sleep", f"Awake {awake / 2**30:.1f} GiB of the GPU are used, asleep {asleep / 2**30:.1f} GiB.")
        assert awake - asleep > 0.15 * total  # most of memory_fraction is its cache


def test_what_was_pushed_is_what_a_fresh_server_holds(engine, folders, device, tmp_path):
    """Checksums of all weights, and logprobs: the same kernels on the same bits."""
    ids = tokens(100, 4)
    sync = WeightSync(engine.config, source=FolderSource(folders[1], device), engines=(engine,), model_path=folders[0])
    sync.push(3)
    pushed, sums = engine.client.score(ids), checksums(engine)
    sync.close()
    engine.stop()
    shutil.copytree(folders[1], tmp_path / "model")
    (fresh,) = start_engines(engine.config, model_path=tmp_path / "model", run_dir=tmp_path)
    with fresh:
        assert checksums(fresh) == sums
        np.testing.assert_array_equal(fresh.client.score(ids), pushed)


def test_weights_go_to_another_gpu_over_nccl(config, folders, device, tmp_path, report):
    """NCCL has no two ranks on one GPU, so this needs a second one."""
    if device == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip(f"nccl needs a GPU for the trainer and one for the server; here are {torch.cuda.device_count()}")
    apart = dataclasses.replace(config, sync="nccl", sleep_level=0, devices=("1",))
    (engine,) = start_engines(apart, model_path=folders[0], run_dir=tmp_path)
    with engine:
        sync = WeightSync(apart, source=FolderSource(folders[1], "cuda:0"), engines=(engine,), model_path=folders[0])
        sync.push(1)
        seconds = sync.push(2).seconds
        pushed = checksums(engine)
        sync.close()
    report.add("Weights over nccl", f"The second push took {seconds:.3f} s.")
    (fresh,) = start_engines(apart, model_path=folders[1], run_dir=tmp_path / "fresh")
    with fresh:
        assert checksums(fresh) == pushed
