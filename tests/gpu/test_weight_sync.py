"""On a GPU: weights pushed through shared memory are served, and a sleeping server gives its memory back.

Run by `make test-gpu`. Skipped, with the reason, elsewhere. The same on CPUs: tests/rollout/test_ipc.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.config.trainer_faults import has_module
from megatron_r1.rollout import Engine, WeightSync, start_engines

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
VOCABULARY = 512
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    if not has_module("vllm"):
        pytest.skip("needs vLLM: make install-gpu")


def save(folder: Path, seed: int) -> Path:
    """A random Llama with heads of 64, which every GPU attention of vLLM takes, and a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=1024, **SHAPE))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)
    return folder


class Source:
    """The weights of a folder, on the GPU as a trainer's are."""

    def __init__(self, folder: Path) -> None:
        self.tensors = {name: tensor.cuda() for name, tensor in load_file(folder / "model.safetensors").items()}

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())


def expected(folder: Path, ids: list[int]) -> np.ndarray:
    """Logprobs by transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return np.concatenate([[0.0], logprobs_TV[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save(root / f"model-{seed}", seed) for seed in range(2)]


@pytest.fixture(scope="module")
def engine(folders, tmp_path_factory) -> Iterator[Engine]:
    config = RolloutConfig(
        device="cuda", sync="ipc", sleep_level=2, memory_fraction=0.3, max_model_len=512, sync_bucket_mib=1,
        sampling=SamplingConfig(max_new_tokens=8),
    )  # fmt: skip
    (engine,) = start_engines(config, model_path=folders[0], run_dir=tmp_path_factory.mktemp("run"))
    with engine:
        yield engine


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_a_push_is_served_and_a_sleeping_server_gives_memory_back(engine, folders):
    ids = np.random.default_rng(3).integers(3, VOCABULARY, 200).tolist()
    np.testing.assert_allclose(engine.client.score(ids), expected(folders[0], ids), atol=0.1)
    sync = WeightSync(engine.config, source=Source(folders[1]), engines=(engine,), model_path=folders[0])
    sync.push(1)
    np.testing.assert_allclose(engine.client.score(ids), expected(folders[1], ids), atol=0.1)
    awake = used_bytes()
    engine.client.sleep(2)
    asleep = used_bytes()
    engine.client.wake("weights")
    sync.push(2)
    engine.client.wake("kv_cache")
    total = torch.cuda.get_device_properties(0).total_memory
    assert awake - asleep > 0.15 * total, (awake, asleep)  # most of memory_fraction is its cache
    np.testing.assert_allclose(engine.client.score(ids), expected(folders[1], ids), atol=0.1)
    sync.close()


def test_a_fresh_server_says_the_same_as_the_one_that_was_pushed_to(engine, folders, tmp_path):
    """Bit for bit: the same kernels on the same weights."""
    ids = np.random.default_rng(4).integers(3, VOCABULARY, 100).tolist()
    sync = WeightSync(engine.config, source=Source(folders[1]), engines=(engine,), model_path=folders[0])
    sync.push(3)
    pushed = engine.client.score(ids)
    sync.close()
    engine.stop()
    shutil.copytree(folders[1], tmp_path / "model")
    (fresh,) = start_engines(engine.config, model_path=tmp_path / "model", run_dir=tmp_path)
    with fresh:
        np.testing.assert_array_equal(fresh.client.score(ids), pushed)
