"""Megatron's modules beside transformers': a recording of those is compared like one of vLLM's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from diagnosis import departing, diagnoses, planted, swap
from oracles import make_model, random_sequences, save_model
from safetensors.torch import save_file

NUM_TOKENS = 40
FAULTS = {
    "deepseek_v3": ("model.layers.2.mlp", [f"model.layers.2.mlp.experts.{n}.down_proj.weight" for n in (1, 4)]),
    "qwen3_moe": ("model.layers.1.self_attn", [f"model.layers.1.self_attn.{part}_norm.weight" for part in "qk"]),
    "llama": ("model.layers.1.mlp", [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]),
}
"""By model: the module that departs, and the two tensors that its trainer has swapped."""
LAYOUTS = {"deepseek_v3": ("one", "tp2", "vpp2"), "qwen3_moe": ("one", "ep2"), "llama": ("one", "pp2")}
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def record(name: str, file: Path) -> None:
    """What transformers' modules compute, under the names of megatron_r1.activations."""
    model, found = make_model(name), {}
    ids = torch.from_numpy(random_sequences([NUM_TOKENS])[0]).long()

    def keep(key: str, values: torch.Tensor) -> None:
        found[key] = values.reshape(NUM_TOKENS, -1).clone()

    def given(key: str, _, positional: tuple, named: dict) -> None:
        keep(key, positional[0] if positional else named["hidden_states"])

    def gives(key: str, _, __, output) -> None:
        keep(key, output[0] if isinstance(output, tuple) else output)

    def routes(layer: str, _, __, output: tuple) -> None:
        keep(f"{layer}.mlp.gate", output[0])
        keep(f"{layer}.mlp.experts", output[-1].to(torch.int32))

    inputs, outputs = {"model.norm": "model.norm.input"}, ["model.embed_tokens", "model.norm"]
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}"
        inputs |= {prefix: f"{prefix}.input", f"{prefix}.post_attention_layernorm": f"{prefix}.middle"}
        outputs += [f"{prefix}.{part}" for part in PARTS]
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(partial(routes, prefix))
    for module, key in inputs.items():
        model.get_submodule(module).register_forward_pre_hook(partial(given, key), with_kwargs=True)
    for module in outputs:
        model.get_submodule(module).register_forward_hook(partial(gives, module))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    label_logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    logprobs = torch.cat([torch.zeros(1), label_logprobs])
    save_file(found | {"lm_head": logits[:16].clone(), "logprobs": logprobs, "token_ids": ids}, file)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """By "MODEL LAYOUT", and with a fault "MODEL LAYOUT fault"."""
    root, cases = tmp_path_factory.mktemp("activations"), {}
    for name, layouts in LAYOUTS.items():
        folder, file = root / name, root / f"{name}.safetensors"
        save_model(name, folder)
        record(name, file)
        other = planted(folder, root / f"{name} fault", swap(*FAULTS[name][1]))
        words = ["--folder", folder, "--recording", file, "--device", "cpu", "--dtype", "fp32"]
        for layout in layouts:
            cases[f"{name} {layout}"] = (layout, words)
            cases[f"{name} {layout} fault"] = (layout, [*words, "--trainer-folder", other])
    return diagnoses(root, cases)


CASES = [f"{name} {layout}" for name, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.parametrize("case", CASES)
def test_every_module_computes_what_transformers_computes(found, case) -> None:
    assert departing(found[case]) == []
    assert max(module["difference"] for module in found[case]["modules"]) < 2e-6
    assert found[case]["logprob_difference"]["largest"] < 1e-5
    sparse = case.split()[0] != "llama"
    assert any(module["name"].endswith("mlp.experts") for module in found[case]["modules"]) == sparse


@pytest.mark.parametrize("case", CASES)
def test_two_swapped_tensors_show_in_their_module_alone(found, case) -> None:
    module, tensors = FAULTS[case.split()[0]]
    assert departing(found[f"{case} fault"]) == [module]
    assert found[f"{case} fault"]["unlike_tensors"] == tensors
    assert found[f"{case} fault"]["hidden_differences"][-1] > 1e-3
