"""The experts that a server says it chose are those that transformers chooses for the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from weight_sources import FolderSource

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.engines.vllm.server import LocalEngine, start_engines
from megatron_r1.engines.vllm.sync import WeightSync
from megatron_r1.rollout.routes import RouteForm
from megatron_r1.types import Completion

from .conftest import Oracle, prompt

SAMPLING = SamplingConfig(max_new_tokens=30)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["tp1", "tp2"])
def routing(request, config: RolloutConfig, folders, tmp_path_factory) -> Iterator[LocalEngine]:
    """A server with room for few tokens, so that many requests at once must wait for one another or begin again."""
    small = dataclasses.replace(
        config, routes="replay", kv_cache_gib=0.0018, max_num_seqs=32, tensor_parallel=request.param
    )
    (engine,) = start_engines(small, model_path=folders[0], run_dir=tmp_path_factory.mktemp("routes"))
    with engine:
        yield engine


def chosen_by(oracle: Oracle, token_ids: list[int]) -> np.ndarray:
    """[T - 1, sparse layers, K], in ascending order."""
    found: list[torch.Tensor] = []
    layers = [layer for layer in oracle.model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [layer.mlp.gate.register_forward_hook(lambda *call: found.append(call[-1][2])) for layer in layers]
    with torch.no_grad():
        oracle.model(torch.tensor([token_ids[:-1]]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1).sort(-1).values.numpy()


def check(group: tuple[Completion, ...], ids: list[int], oracle: Oracle, form: RouteForm) -> int:
    """All tokens' experts are the oracle's; returns how many there were."""
    total = 0
    for completion in group:
        taken = form.taken(completion, len(ids)).routes
        assert taken is not None and taken.dtype == np.uint8
        expected = chosen_by(oracle, ids + completion.token_ids.tolist())
        np.testing.assert_array_equal(np.sort(taken, -1), expected)
        total += len(taken)
    return total


def preemptions(engine: LocalEngine) -> float:
    text = engine.client.exchange(engine.client.pool, "GET", "/metrics", None, 30).decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_preemptions_total"))


def test_a_group_and_its_shared_prompt(routing: LocalEngine, oracles: list[Oracle], folders) -> None:
    """A prompt of 70 tokens fills two blocks of the cache, which the group shares, and the second request finds."""
    form, ids = RouteForm.of(load_shape(folders[0])), prompt(70, 1)
    for seed in (5, 6):
        group = routing.client.generate(ids, num_completions=4, sampling=SAMPLING, seed=seed)
        assert check(group, ids, oracles[0], form) > 4 * 70


def test_many_requests_that_the_cache_has_no_room_for(routing: LocalEngine, oracles: list[Oracle], folders) -> None:
    form, ids, before = RouteForm.of(load_shape(folders[0])), prompt(40, 2), preemptions(routing)
    long = SamplingConfig(max_new_tokens=250)
    group = routing.client.generate(ids, num_completions=24, sampling=long, seed=1)
    assert preemptions(routing) > before, "some requests began again"
    assert check(group, ids, oracles[0], form) > 24 * 40


def test_after_a_push_they_are_the_new_weights(routing: LocalEngine, oracles: list[Oracle], folders) -> None:
    form, ids, weights = RouteForm.of(load_shape(folders[0])), prompt(70, 1), FolderSource(folders[1])
    sync = WeightSync(routing.config, source=weights, engines=(routing,), model_path=folders[0])
    try:
        sync.push(1)
        check(routing.client.generate(ids, num_completions=4, sampling=SAMPLING, seed=5), ids, oracles[1], form)
    finally:
        weights.show(folders[0])
        sync.push(2)
        sync.close()


def test_answers_of_a_token_or_to_score_are_as_ever(routing: LocalEngine, oracles: list[Oracle], folders) -> None:
    form, ids = RouteForm.of(load_shape(folders[0])), prompt(33, 3)
    group = routing.client.generate(ids, num_completions=3, sampling=SamplingConfig(max_new_tokens=1), seed=1)
    assert check(group, ids, oracles[0], form) == 3 * 33
    np.testing.assert_allclose(routing.client.score(ids), oracles[0].logprobs(ids), atol=1e-4)
