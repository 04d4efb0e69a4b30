"""Weights pushed into a running server are the weights that it then serves.

Oracles: transformers on the same folder, and the same server's own answers when it was fresh from disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from weight_sources import FolderSource, HalvesSource

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.engines.vllm.server import LocalEngine, start_engines
from megatron_r1.engines.vllm.sync import WeightSync
from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box

from .conftest import VOCABULARY, Oracle, prompt, save_model


def test_three_pushes_in_a_row_each_serve_what_was_pushed(
    engine: LocalEngine,
    sync: WeightSync,
    weights: FolderSource,
    folders: list[Path],
    oracles: list[Oracle],
    fresh_scores: np.ndarray,
) -> None:
    ids, sampling = prompt(100, 7), SamplingConfig(max_new_tokens=12)
    for which in (1, 2, 0):
        # Fills the prefix cache with the old weights' keys and values for the prompt that follows the push.
        engine.client.generate(ids, num_completions=1, sampling=sampling, seed=0)
        weights.show(folders[which])
        version = sync.version + 1
        report = sync.push(version)
        assert report.version == engine.client.weight_version() == version
        assert report.num_bytes == sum(tensor.numel() * 4 for tensor in weights.tensors.values())
        assert set(report.parts) == {"connect", "pause", "transfer", "resume", "verify"}
        np.testing.assert_allclose(engine.client.score(ids), oracles[which].logprobs(ids), atol=1e-4)
        (completion,) = engine.client.generate(ids, num_completions=1, sampling=sampling, seed=0)
        assert completion.weight_version == version
        expected = oracles[which].logprobs(ids + completion.token_ids.tolist())[len(ids) :]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    np.testing.assert_allclose(engine.client.score(ids), fresh_scores, atol=1e-6)


def test_many_pushes_keep_memory_and_stay_quick(engine: LocalEngine, sync: WeightSync) -> None:
    core = [child for child in psutil.Process(engine.pid).children() if "EngineCore" in child.name()]
    watched = [psutil.Process(), *core]
    assert len(watched) == 2
    seconds = [sync.push(sync.version + 1).seconds for _ in range(10)]
    before = [process.memory_info().rss for process in watched]
    seconds += [sync.push(sync.version + 1).seconds for _ in range(60)]
    growth = [process.memory_info().rss - start for process, start in zip(watched, before)]
    # 60 pushes of 0.9 MB: keeping any copy of the weights would show as 54 MB or more.
    assert max(growth) < 20e6, growth
    assert sorted(seconds)[len(seconds) // 2] < 0.5, seconds


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "model.layers.1.self_attn.o_proj.weight",
            (64, 127),
            r"o_proj.weight: got shape \(64, 127\).*\(64, 128\)",
        ),
        ("model.layers.7.self_attn.o_proj.weight", (64, 128), "layers.7.*not in the served checkpoint"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_and_the_server_keeps_serving(
    engine: LocalEngine, sync: WeightSync, weights: FolderSource, name: str, shape: tuple[int, ...], message: str
) -> None:
    ids, version = prompt(30, 3), sync.version
    before, kept = engine.client.score(ids), dict(weights.tensors)
    weights.tensors[name] = torch.zeros(shape)
    try:
        with pytest.raises(ValueError, match=message):
            sync.push(version + 1)
    finally:
        weights.tensors = kept
    assert engine.client.weight_version() == version == sync.version
    np.testing.assert_array_equal(engine.client.score(ids), before)


def test_a_shape_that_the_server_cannot_load_is_refused_before_it_is_paused(
    engine: LocalEngine,
    weights: FolderSource,
    sync: WeightSync,
    config: RolloutConfig,
    oracles,
    folders,
    tmp_path: Path,
) -> None:
    """Without a checkpoint to check against, the wrong shape is found when vLLM says what it wants."""
    unchecked = WeightSync(config, source=weights, engines=(engine,), model_path=tmp_path)
    weights.show(folders[1])
    kept, name = dict(weights.tensors), "model.layers.2.self_attn.o_proj.weight"
    weights.tensors[name] = torch.zeros(64, 127)
    version = engine.client.weight_version()
    with pytest.raises(Exception, match=r"vLLM cannot load model.layers.2.self_attn.o_proj.weight \[64, 127\]"):
        unchecked.push(sync.version + 1)
    unchecked.close()
    sync.disconnect()
    weights.tensors = kept
    assert engine.client.weight_version() == version
    engine.client.generate(prompt(5, 1), num_completions=1, sampling=SamplingConfig(max_new_tokens=2))
    sync.push(sync.version + 1)
    ids = prompt(100, 7)
    np.testing.assert_allclose(engine.client.score(ids), oracles[1].logprobs(ids), atol=1e-4)


def test_a_server_of_a_smaller_model_is_refused_before_it_is_paused(
    engine: LocalEngine, sync: WeightSync, config: RolloutConfig, folders: list[Path], tmp_path: Path
) -> None:
    """vLLM's loaders would take the first rows and columns of what is larger, and say nothing."""
    wide = FolderSource(folders[1])
    for name, shape in (("gate_proj", (192, 64)), ("up_proj", (192, 64)), ("down_proj", (64, 192))):
        wide.tensors[f"model.layers.0.mlp.{name}.weight"] = torch.ones(shape)
    unchecked = WeightSync(config, source=wide, engines=(engine,), model_path=tmp_path)
    version, ids = engine.client.weight_version(), prompt(30, 3)
    before = engine.client.score(ids)
    with pytest.raises(
        EngineError, match=r"takes 64 x 128 of the 64 x 192 numbers of model.layers.0.mlp.down_proj.weight \(3 of"
    ):
        unchecked.push(sync.version + 1)
    unchecked.close()
    assert engine.client.weight_version() == version
    assert "the trainer will not send these weights to this server" in engine.log_path.read_text()
    np.testing.assert_array_equal(engine.client.score(ids), before)
    sync.disconnect()
    sync.push(sync.version + 1)


def test_a_push_of_some_layers_leaves_the_others_as_they_were(
    engine: LocalEngine, sync: WeightSync, weights: FolderSource, folders: list[Path], tmp_path: Path
) -> None:
    """Frozen layers are left out of a push; experts among them stay in their kernel's layout."""
    weights.show(folders[0])
    sync.push(sync.version + 1)
    start, other = dict(weights.tensors), FolderSource(folders[1]).tensors
    moved = {name: tensor for name, tensor in other.items() if ".layers.1." in name or name == "lm_head.weight"}
    weights.tensors = dict(reversed(moved.items()))  # the order of the stream is the source's affair
    sync.push(sync.version + 1)
    mixed = tmp_path / "mixed"
    shutil.copytree(folders[0], mixed)
    save_file(start | moved, mixed / "model.safetensors", metadata={"format": "pt"})
    ids = prompt(100, 7)
    np.testing.assert_allclose(engine.client.score(ids), Oracle(mixed).logprobs(ids), atol=1e-4)
    weights.show(folders[0])
    sync.push(sync.version + 1)


def save_tied_llama(folder: Path, seed: int, tokenizer: Path) -> Path:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **shape))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
def test_a_tied_head_follows_its_embedding(config: RolloutConfig, folders: list[Path], tmp_path: Path) -> None:
    """vLLM's head has a packed copy of the embedding on CPU, which a push of the embedding must renew."""
    models = [save_tied_llama(tmp_path / f"model-{seed}", seed, folders[0]) for seed in (20, 21)]
    ids = prompt(60, 7)
    (engine,) = start_engines(config, model_path=models[0], run_dir=tmp_path)
    with engine:
        weights = FolderSource(models[1])
        assert "lm_head.weight" not in weights.tensors
        sync = WeightSync(config, source=weights, engines=(engine,), model_path=models[0])
        sync.push(1)
        pushed = engine.client.score(ids)
        sync.close()
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(models[1], dtype=torch.float32)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    np.testing.assert_allclose(pushed[1:], expected, atol=1e-4)


def test_a_part_of_a_layer_is_refused(engine: LocalEngine, sync: WeightSync, weights: FolderSource) -> None:
    kept, version = dict(weights.tensors), sync.version
    del weights.tensors["model.layers.1.self_attn.o_proj.weight"]
    try:
        with pytest.raises(ValueError, match=r"model\.layers\.1: \d+ of its \d+ tensors are sent"):
            sync.push(version + 1)
    finally:
        weights.tensors = kept
    assert engine.client.weight_version() == version


class Liar(FolderSource):
    """A source that reads other shapes than it has announced."""

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        rows = super().read(tensor, box)
        return rows[:1] if list(self.tensors)[tensor] == "model.norm.weight" else rows


def test_a_source_that_breaks_its_word_is_named(
    engine: LocalEngine, sync: WeightSync, config: RolloutConfig, folders: list[Path], oracles: list[Oracle]
) -> None:
    broken = WeightSync(config, source=Liar(folders[2]), engines=(engine,), model_path=folders[0])
    with pytest.raises(ValueError, match=r"announced 64 x 1 numbers of model.norm.weight and read \[1, 1\]"):
        broken.push(sync.version + 1)
    broken.close()
    sync.disconnect()
    sync.push(sync.version + 1)
    assert engine.client.weight_version() == sync.version


class Planted(FolderSource):
    """Of the tensor called `name` the server gets other numbers than those that the trainer has."""

    name, reads = "", 0

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        rows = super().read(tensor, box)
        if list(self.tensors)[tensor] != self.name:
            return rows
        self.reads += 1
        return -rows.flip(0) if self.reads == 1 else rows  # the first is the one that is sent


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
        "model.layers.2.mlp.experts.1.down_proj.weight",
    ],
)
def test_a_server_that_holds_other_numbers_is_found(
    name: str, engine: LocalEngine, sync: WeightSync, config: RolloutConfig, folders: list[Path], weights: FolderSource
) -> None:
    """At the first push, when all tensors are compared, and at a later one, in the tensor's turn."""
    planted = Planted(folders[1])
    every = dataclasses.replace(config, check_tensors=len(planted.tensors))
    own = WeightSync(every, source=planted, engines=(engine,), model_path=folders[0])
    for later in (False, True):
        if later:
            planted.name = ""
            own.push(sync.version + 1)
        planted.name, planted.reads = name, 0
        with pytest.raises(EngineError, match=rf"{name}, rows 0 to \d+, columns 0 to \d+, on worker 0 of vllm-0"):
            own.push(sync.version + 2)
    own.close()
    sync.disconnect()
    sync.push(sync.version + 1)


class Striking(FolderSource):
    """Does something to a server while its weights are packed, once `server` is set."""

    server: LocalEngine | None = None

    def strike(self, server: LocalEngine) -> None:
        raise NotImplementedError

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        if self.server is not None and tensor == len(self.tensors) // 2:
            server, self.server = self.server, None
            self.strike(server)
        return super().read(tensor, box)


class Killing(Striking):
    def strike(self, server: LocalEngine) -> None:
        os.killpg(server.pid, signal.SIGKILL)


class Stopping(Striking):
    """Its worker then neither works nor ends."""

    def strike(self, server: LocalEngine) -> None:
        for process in psutil.Process(server.pid).children(recursive=True):
            process.suspend()


def check_recovery(
    source: Striking, config: RolloutConfig, folders: list[Path], oracles: list[Oracle], run_dir: Path
) -> None:
    """A server that is struck in its second push: the push ends soon, and the next one, after a restart, is whole."""
    (engine,) = start_engines(config, model_path=folders[0], run_dir=run_dir)
    with engine:
        sync = WeightSync(config, source=source, engines=(engine,), model_path=folders[0])
        sync.push(1)
        source.server = engine
        begun = time.monotonic()
        with pytest.raises(EngineError):
            sync.push(2)
        assert time.monotonic() - begun < 60 and sync.version == 1
        engine.restart()
        source.show(folders[2])
        sync.push(3)
        ids = prompt(60, 7)
        np.testing.assert_allclose(engine.client.score(ids), oracles[2].logprobs(ids), atol=1e-4)
        assert engine.client.weight_version() == 3
        sync.close()


def test_a_server_that_dies_in_a_push_ends_it_and_the_next_is_whole(
    config: RolloutConfig, folders: list[Path], oracles: list[Oracle], tmp_path: Path
) -> None:
    check_recovery(Killing(folders[1]), config, folders, oracles, tmp_path)


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_push_at_the_deadline_and_the_next_is_whole(
    config: RolloutConfig, folders: list[Path], oracles: list[Oracle], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("megatron_r1.engines.vllm.shard_channel.MEETING_SECONDS", 10.0)
    check_recovery(Stopping(folders[1]), config, folders, oracles, tmp_path)


def second_rank(store: str, config: RolloutConfig, source: type[HalvesSource], folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=2)
    sync = WeightSync(config, source=source(folder, 1), engines=(), model_path=folder, rank=1)
    sync.push(1)
    sync.push(2)
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def beside_a_second_rank(
    config: RolloutConfig, source: type[HalvesSource], folder: Path, store: Path, exitcode: int = 0
) -> Iterator[None]:
    """This process is rank 0 of two; the other pushes twice, and ends with `exitcode`."""
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=second_rank, args=(str(store), config, source, folder))
    other.start()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        other.join(30)
    assert other.exitcode == exitcode


def test_each_trainer_rank_sends_what_it_holds(
    engine: LocalEngine, sync: WeightSync, config: RolloutConfig, folders: list[Path], oracles, tmp_path: Path
) -> None:
    with beside_a_second_rank(config, HalvesSource, folders[2], tmp_path / "store"):
        both = WeightSync(config, source=HalvesSource(folders[2], 0), engines=(engine,), model_path=folders[2])
        both.push(sync.version + 1)
        both.push(sync.version + 2)
        both.close()
    ids = prompt(100, 7)
    np.testing.assert_allclose(engine.client.score(ids), oracles[2].logprobs(ids), atol=1e-4)
    sync.disconnect()
    sync.push(sync.version + 3)


class Dying(HalvesSource):
    """Its process is killed in the middle of the second push."""

    pushes = 0

    def reading(self) -> AbstractContextManager[object]:
        self.pushes += 1
        return super().reading()

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        if self.pushes == 2 and tensor > len(self.tensors) // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(tensor, box)


@pytest.mark.parametrize("way", ["gloo", "ipc"])
def test_a_trainer_rank_that_is_killed_in_a_push_ends_it_and_the_next_is_whole(
    way: str, engine: LocalEngine, sync: WeightSync, config: RolloutConfig, folders: list[Path], oracles, tmp_path: Path
) -> None:
    sync.disconnect()
    own = dataclasses.replace(config, sync=way)
    with beside_a_second_rank(own, Dying, folders[2], tmp_path / "store", exitcode=-signal.SIGKILL):
        both = WeightSync(own, source=HalvesSource(folders[2], 0), engines=(engine,), model_path=folders[2])
        both.push(sync.version + 1)
        begun = time.monotonic()
        with pytest.raises((EngineError, RuntimeError)):
            both.push(sync.version + 2)
        assert time.monotonic() - begun < 60
    both.close()
    ids = prompt(60, 7)
    assert np.isfinite(engine.client.score(ids)).all()
    sync.push(sync.version + 3)
    assert engine.client.weight_version() == sync.version


@pytest.mark.slow
def test_bf16_weights_are_served_as_from_disk(config: RolloutConfig, tmp_path: Path) -> None:
    """A bf16 server: pushing its own start weights back gives its fresh answers to the last bit."""
    folders = [save_model(tmp_path / f"model-{seed}", seed, torch.bfloat16) for seed in (10, 11)]
    ids = prompt(100, 7)
    bf16 = dataclasses.replace(config, dtype="bf16")
    (engine,) = start_engines(bf16, model_path=folders[0], run_dir=tmp_path)
    with engine:
        fresh = engine.client.score(ids)
        weights = FolderSource(folders[1])
        sync = WeightSync(bf16, source=weights, engines=(engine,), model_path=folders[0])
        sync.push(1)
        pushed = engine.client.score(ids)
        weights.show(folders[0])
        sync.push(2)
        back = engine.client.score(ids)
        sync.close()
    # bf16 rounds logits of this sharp random model by about 0.02, and now and then turns an expert choice.
    assert np.median(np.abs(pushed - Oracle(folders[1]).logprobs(ids))) < 5e-2
    assert np.abs(pushed - fresh).max() > 0.5
    np.testing.assert_allclose(back, fresh, atol=1e-4)
