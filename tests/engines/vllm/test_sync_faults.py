"""Servers whose weights go wrong when they are processed, after they came: the first push already names the tensor."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from weight_sources import FolderSource

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.vllm.server import LocalEngine, start_engines
from megatron_r1.engines.vllm.sync import WeightSync
from megatron_r1.errors import EngineError

from .conftest import prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LAYER = "model.layers.2"


@pytest.fixture(scope="module")
def faulty(config: RolloutConfig, folders: list[Path], tmp_path_factory) -> Iterator[LocalEngine]:
    own = dataclasses.replace(config, vllm_args=("worker-extension-cls=faulty_worker.FaultyWorker",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        (engine,) = start_engines(own, model_path=folders[0], run_dir=tmp_path_factory.mktemp("run"))
    with engine:
        yield engine


def plant(engine: LocalEngine, module: str, fault: str) -> None:
    engine.client.request("POST", "/collective_rpc", {"method": "plant", "args": [module, fault]})


@pytest.mark.parametrize(
    ("module", "fault", "tensor"),
    [
        (f"{LAYER}.self_attn.o_proj", "stale", f"{LAYER}.self_attn.o_proj.weight"),
        ("lm_head", "stale", "lm_head.weight"),
        ("lm_head", "nan", "lm_head.weight"),
        (f"{LAYER}.mlp.gate", "changed", f"{LAYER}.mlp.gate.e_score_correction_bias"),
        ("model.embed_tokens", "changed", "model.embed_tokens.weight"),
        (f"{LAYER}.mlp.experts.routed_experts", "changed", f"{LAYER}.mlp.experts.0.down_proj.weight"),
        (f"{LAYER}.mlp.experts.routed_experts", "unpacked", f"{LAYER}.mlp.experts.0.down_proj.weight"),
    ],
)
def test_a_fault_in_processing_is_named_by_the_first_push(faulty, folders, oracles, module, fault, tensor):
    """Each channel is a new one, so its first push is the first that it compares."""
    source = FolderSource(folders[2])
    sync = WeightSync(faulty.config, source=source, engines=(faulty,), model_path=folders[0])
    plant(faulty, module, fault)
    try:
        with pytest.raises(EngineError, match=rf"other numbers than the trainer after a push: {tensor}"):
            sync.push(sync.version + 1)
    finally:
        plant(faulty, module, "none")
    source.show(folders[1])
    sync.push(sync.version + 1)
    ids = prompt(60, 5)
    np.testing.assert_allclose(faulty.client.score(ids), oracles[1].logprobs(ids), atol=1e-4)
    sync.close()


EXPERTS, SHARED = f"{LAYER}.mlp.experts.routed_experts", f"{LAYER}.mlp.shared_experts.gate_up_proj"


@pytest.mark.parametrize(
    ("module", "fault"), [(EXPERTS, "kept"), (f"{LAYER}.self_attn.o_proj", "stale"), (SHARED, "stale")]
)
def test_a_kernel_that_keeps_what_the_server_started_with_is_named_by_the_second_push(faulty, folders, module, fault):
    """A run's first push brings what its servers have: nothing can be seen by it."""
    source = FolderSource(folders[1])
    right = WeightSync(faulty.config, source=source, engines=(faulty,), model_path=folders[0])
    right.push(1)
    right.disconnect()
    plant(faulty, module, fault)
    sync = WeightSync(faulty.config, source=source, engines=(faulty,), model_path=folders[0])
    try:
        sync.push(2)
        source.show(folders[2])
        with pytest.raises(
            EngineError, match=rf"other numbers than the trainer after a push: {LAYER}\.(mlp|self_attn\.o_proj)"
        ):
            sync.push(3)
    finally:
        plant(faulty, module, "none")
    sync.close()


@pytest.mark.parametrize(
    ("module", "fault"),
    [(EXPERTS, "kept"), (EXPERTS, "unpacked"), (SHARED, "stale"), (f"{LAYER}.self_attn.q_b_proj", "nan")],
)
def test_a_fault_that_begins_later_is_found_within_a_turn(faulty, folders, module, fault):
    source = FolderSource(folders[1])
    sync = WeightSync(faulty.config, source=source, engines=(faulty,), model_path=folders[0])
    pushes = itertools.count(1)
    for number in (1, 2, 1):
        source.show(folders[number])
        sync.push(next(pushes))
    plant(faulty, module, fault)
    kinds = {re.sub(r"experts\.\d+", "experts", name) for name, _, _ in source.metadata()}
    found = []
    try:
        for turn in range(-(-len(kinds) // faulty.config.check_tensors)):
            source.show(folders[2 - 2 * (turn % 2)])  # none is the one that was there when the fault was planted
            sync.push(next(pushes))
    except EngineError as error:
        found.append(str(error))
    finally:
        plant(faulty, module, "none")
    assert found and f"other numbers than the trainer after a push: {LAYER}" in found[0]
    sync.close()


def test_what_changed_between_two_pushes_is_mended_by_the_second(faulty, folders, oracles):
    """A router's bias, experts and a norm: the push writes them all, and then they are right."""
    ids = prompt(60, 5)
    sync = WeightSync(faulty.config, source=FolderSource(folders[1]), engines=(faulty,), model_path=folders[0])
    sync.push(sync.version + 1)
    for module in (f"{LAYER}.mlp.gate", f"{LAYER}.mlp.experts.routed_experts", "model.norm"):
        faulty.client.request("POST", "/collective_rpc", {"method": "change", "args": [module]})
    assert np.abs(faulty.client.score(ids) - oracles[1].logprobs(ids)).max() > 0.1
    sync.push(sync.version + 1)
    np.testing.assert_allclose(faulty.client.score(ids), oracles[1].logprobs(ids), atol=1e-4)
    sync.close()


@pytest.mark.parametrize("module", [f"{LAYER}.mlp.experts.routed_experts", f"{LAYER}.mlp.gate", "lm_head"])
def test_a_module_is_processed_once(faulty, folders, module):
    """Experts and their router share the router's bias; those whose kernels shuffle them would be shuffled twice."""
    sync = WeightSync(faulty.config, source=FolderSource(folders[1]), engines=(faulty,), model_path=folders[0])
    plant(faulty, module, "counted")
    sync.push(sync.version + 1)
    plant(faulty, module, "none")
    sync.close()
    answer = faulty.client.request("POST", "/collective_rpc", {"method": "times_processed"})
    assert answer == {"results": ["1"]}
