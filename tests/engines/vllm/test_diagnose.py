"""A recording of a running server beside transformers, and beside trainers with planted faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diagnosis import departing, diagnoses, planted, swap
from safetensors.torch import load_file
from weight_sources import FolderSource

from megatron_r1.engines.base import RequestError
from megatron_r1.engines.vllm.activations import record
from megatron_r1.engines.vllm.server import LocalEngine
from megatron_r1.engines.vllm.sync import WeightSync
from megatron_r1.errors import EngineError
from megatron_r1.weights.convert import ConvertOptions, convert

from .conftest import Oracle, prompt

NUM_TOKENS = 45
EXPERT = "model.layers.{}.mlp.experts.{}.{}.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
KV_NORM = "model.layers.1.self_attn.kv_a_layernorm.weight"
MIDDLE_NORM = "model.layers.0.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def recording(
    engine: LocalEngine, sync: WeightSync, weights: FolderSource, folders: list[Path], tmp_path_factory
) -> Path:
    """Of folders[1]'s weights, which the server was given while it ran; its own were folders[0]'s."""
    weights.show(folders[1])
    sync.push(sync.version + 1)
    file = tmp_path_factory.mktemp("recording") / "recording.safetensors"
    record(engine, prompt(NUM_TOKENS, 3), file)
    return file


def test_what_is_recorded_are_transformers_hidden_states(recording, oracles: list[Oracle]) -> None:
    found, model = load_file(recording), oracles[1].model
    ids = found["token_ids"].tolist()
    assert ids == prompt(NUM_TOKENS, 3)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda _, __, output: seen.update({name: (output[0] if isinstance(output, tuple) else output)})

    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("input_layernorm", "self_attn", "mlp")]
    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in [*names, "model.norm"]]
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    for name, values in seen.items():
        np.testing.assert_allclose(found[name], values.view(NUM_TOKENS, -1), atol=1e-4, rtol=1e-4, err_msg=name)
    for layer, hidden in enumerate(output.hidden_states[:-1]):
        np.testing.assert_allclose(found[f"model.layers.{layer}.input"], hidden[0], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found["lm_head"], output.logits[0, :16], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found["logprobs"], oracles[1].logprobs(ids), atol=1e-4)


def test_the_recorded_experts_are_those_of_transformers_router(recording, oracles: list[Oracle]) -> None:
    found, chosen = load_file(recording), []
    layer = oracles[1].model.model.layers[2]
    hook = layer.mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output))
    with torch.no_grad():
        oracles[1].model(found["token_ids"][None])
    hook.remove()
    experts = next(each for each in chosen[0] if not each.is_floating_point())
    np.testing.assert_array_equal(found["model.layers.2.mlp.experts"].sort(-1).values, experts.sort(-1).values)


def test_a_server_serves_on_after_a_recording(engine: LocalEngine, recording, oracles: list[Oracle]) -> None:
    ids = prompt(30, 9)
    np.testing.assert_allclose(engine.client.score(ids), oracles[1].logprobs(ids), atol=1e-4)


def test_another_pass_than_was_announced_is_an_error_and_the_server_goes_on(
    engine: LocalEngine, recording, tmp_path
) -> None:
    engine.client.request("POST", "/collective_rpc", {"method": "begin_activations", "args": ["7"]})
    before = engine.client.score(prompt(9, 3))
    words = {"method": "end_activations", "args": [str(tmp_path / "file")]}
    with pytest.raises(EngineError, match=r"expected one forward pass of 7 tokens.*shape .9, 64. for 7 rows"):
        engine.client.request("POST", "/collective_rpc", words)
    assert not (tmp_path / "file").exists()
    record(engine, prompt(9, 3), tmp_path / "file")
    np.testing.assert_array_equal(load_file(tmp_path / "file")["logprobs"], before)


def test_tokens_that_no_server_has_room_for_are_refused(engine: LocalEngine, tmp_path) -> None:
    with pytest.raises((ValueError, RequestError), match="max_model_len"):
        record(engine, prompt(engine.config.max_model_len, 3), tmp_path / "file")


@pytest.fixture(scope="module")
def found(recording, folders: list[Path], tmp_path_factory) -> dict[str, dict]:
    """By fault."""
    root, good = tmp_path_factory.mktemp("diagnose"), folders[1]
    stale = load_file(folders[0] / "model.safetensors")

    def of(*names: str):
        return lambda tensors: tensors.update({name: stale[name] for name in names})

    def zero(name: str):
        return lambda tensors: tensors[name].zero_()

    changes = {
        "stale head": of("lm_head.weight"),
        "stale embedding of one token": lambda tensors: tensors["model.embed_tokens.weight"][
            prompt(NUM_TOKENS, 3)[7]
        ].zero_(),
        "swapped experts": swap(EXPERT.format(2, 3, "down_proj"), EXPERT.format(2, 5, "down_proj")),
        "gate and up swapped": swap(EXPERT.format(1, 6, "gate_proj"), EXPERT.format(1, 6, "up_proj")),
        "stale shared expert": of("model.layers.1.mlp.shared_experts.up_proj.weight"),
        "router bias not sent": zero(BIAS),
        "stale router": of("model.layers.2.mlp.gate.weight"),
        "stale latent norm": lambda tensors: tensors[KV_NORM].mul_(1.01),
        "stale norm": lambda tensors: tensors[MIDDLE_NORM].mul_(1.01),
        "not a number": lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"][0].fill_(float("nan")),
        "two faults": lambda tensors: (of("lm_head.weight")(tensors), zero(BIAS)(tensors)),
    }
    words = ["--folder", good, "--recording", recording, "--device", "cpu", "--dtype", "fp32"]
    cases = {"none": ("one", words)}
    trainers = {name: planted(good, root / name, change) for name, change in changes.items()}
    trainers["rope base"] = planted(
        good, root / "rope base", fields={"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    )
    cases |= {name: ("one", [*words, "--trainer-folder", folder]) for name, folder in trainers.items()}
    for layout in ("tp2", "ep2", "pp2 of 3", "cp2"):
        cases[f"none {layout}"] = (layout, words)
        for fault in ("swapped experts", "stale head", "router bias not sent"):
            cases[f"{fault} {layout}"] = (layout, [*words, "--trainer-folder", trainers[fault]])
    # The trainer of "stale router" as a run would have it in a checkpoint, read again under another layout.
    checkpoint = root / "stale router.checkpoint"
    checkpoint.mkdir()
    cases["checkpoint tp2"] = ("tp2", [*words, "--trainer-folder", checkpoint])
    convert(trainers["stale norm"], root / "torch_dist", ConvertOptions(target="torch_dist", workers=1))
    cases["torch_dist"] = ("one", [*words, "--trainer-folder", root / "torch_dist"])
    return diagnoses(root, cases)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ATTENTION = "model.layers.1.self_attn"
FAULTS = {
    "stale head": (["lm_head"], [HEAD]),
    "stale embedding of one token": (["model.embed_tokens"], [EMBEDDING]),
    "swapped experts": (["model.layers.2.mlp"], [EXPERT.format(2, 3, "down_proj"), EXPERT.format(2, 5, "down_proj")]),
    "gate and up swapped": (
        ["model.layers.1.mlp"],
        [EXPERT.format(1, 6, "gate_proj"), EXPERT.format(1, 6, "up_proj")],
    ),
    "stale shared expert": (["model.layers.1.mlp"], ["model.layers.1.mlp.shared_experts.up_proj.weight"]),
    "router bias not sent": (["model.layers.1.mlp.experts"], [BIAS]),
    "stale router": (["model.layers.2.mlp.gate"], ["model.layers.2.mlp.gate.weight"]),
    "stale latent norm": ([ATTENTION], [KV_NORM]),
    "stale norm": (["model.layers.0.post_attention_layernorm"], [MIDDLE_NORM]),
    "not a number": ([ATTENTION], [f"{ATTENTION}.o_proj.weight"]),
    "two faults": (["model.layers.1.mlp.experts", "lm_head"], [BIAS]),
    "rope base": ([f"model.layers.{layer}.self_attn" for layer in range(3)], []),
}
"""The modules that depart, and which of the first one's tensors are not the same in the two folders."""


@pytest.mark.parametrize("fault", FAULTS)
def test_the_module_with_the_fault_is_named_and_no_other(found, fault) -> None:
    modules, unlike = FAULTS[fault]
    assert departing(found[fault]) == modules
    assert found[fault]["first"] == modules[0] and not found[fault]["agree"]
    assert found[fault]["unlike_tensors"] == unlike
    if fault != "not a number":
        assert found[fault]["logprob_difference"]["mean"] > 1e-3  # what the step-0 check would show


@pytest.mark.parametrize("layout", ["tp2", "ep2", "pp2 of 3", "cp2"])
@pytest.mark.parametrize("fault", ["swapped experts", "stale head", "router bias not sent"])
def test_a_layout_finds_the_same_numbers(found, fault, layout) -> None:
    here, there = found[fault], found[f"{fault} {layout}"]
    assert departing(there) == departing(here)
    for one, other in zip(here["modules"], there["modules"], strict=True):
        assert one["name"] == other["name"]
        assert other["difference"] == pytest.approx(one["difference"], abs=1e-5), one["name"]
        assert other["drift"] == pytest.approx(one["drift"], abs=1e-4), one["name"]
    assert there["logprob_difference"] == pytest.approx(here["logprob_difference"], abs=1e-4)


@pytest.mark.parametrize("case", ["none", "none tp2", "none ep2", "none pp2 of 3", "none cp2"])
def test_the_same_weights_agree_under_every_layout(found, case) -> None:
    assert departing(found[case]) == [] and found[case]["agree"] and found[case]["first"] is None
    parts = ["input_layernorm", "self_attn", "post_attention_layernorm"]
    sparse = [*parts, "mlp.gate", "mlp.experts", "mlp"]
    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in (sparse if layer else [*parts, "mlp"])]
    assert [module["name"] for module in found[case]["modules"]] == [
        "model.embed_tokens",
        *names,
        "model.norm",
        "lm_head",
    ]
    assert max(module["difference"] for module in found[case]["modules"]) < 2e-6
    assert max(module["drift"] for module in found[case]["modules"]) < 1e-5
    assert found[case]["logprob_difference"]["largest"] < 1e-5


def test_a_runs_checkpoint_is_compared_like_a_folder(found) -> None:
    here, there = found["stale router"], found["checkpoint tp2"]
    assert departing(there) == ["model.layers.2.mlp.gate"] and there["unlike_tensors"] is None
    for one, other in zip(here["modules"], there["modules"], strict=True):
        assert other["difference"] == pytest.approx(one["difference"], abs=1e-5), one["name"]


def test_a_torch_dist_folder_is_compared_like_hugging_faces(found) -> None:
    assert departing(found["torch_dist"]) == departing(found["stale norm"])
    assert found["torch_dist"]["unlike_tensors"] == [MIDDLE_NORM]


def test_a_faulty_expert_is_named_by_the_tokens_that_have_it(found, recording) -> None:
    (module,) = (module for module in found["gate and up swapped"]["modules"] if module["departs"])
    chosen = load_file(recording)["model.layers.1.mlp.experts"].numpy()
    without = chosen[~(chosen == 6).any(axis=1)]
    assert module["experts"] == [expert for expert in range(8) if expert == 6 or not (without == expert).any()]
    assert EXPERT.format(1, 6, "down_proj") in module["weights"]
    assert (
        f"has expert {' or '.join(map(str, module['experts']))}, and no other"
        in found["gate and up swapped"]["verdict"]
    )


def test_other_numbers_of_config_json_are_said(found) -> None:
    assert found["rope base"]["config_differences"] == {"rope.theta": {"vllm": 10000.0, "megatron": 500.0}}
    assert "rope.theta (10000.0 for vLLM, 500.0 for Megatron)" in found["rope base"]["verdict"]
    assert "these are the same in the two folders" in found["rope base"]["verdict"]


def test_the_table_marks_what_departs_where_it_stands(found) -> None:
    lines = {line[:20].strip(): line for line in found["two faults"]["table"].splitlines()}
    assert [name for name, line in lines.items() if "*" in line] == ["layer 1", "lm_head"]
    share = next(module for module in found["two faults"]["modules"] if module["departs"])["difference"]
    assert f"{share:.1%} *" in lines["layer 1"]
