"""One DeepSeek-V3 under every layout: logits and gradients against transformers, and against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import all_logits, random_sequences, save_model
from ranks import Results, run_launches

pytestmark = pytest.mark.timeout(1200)
RANKS = {1: ["one"], 2: ["tp2", "ep2", "pp2", "vpp2", "cp2", "tp2ep2"], 4: ["tp2pp2ep2"]}
LAYOUTS = [name for names in RANKS.values() for name in names]
LENGTHS = [64, 37, 52, 20, 44, 12, 30, 8]
CLIP_LOW, CLIP_HIGH, KL = 0.2, 0.3, 0.05


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """What every layout computed, and as "oracle" the folder's oracle values."""
    folder = tmp_path_factory.mktemp("layouts")
    model = save_model("deepseek_v3", folder, mtp_layers=1)
    sequences = random_sequences(LENGTHS)
    oracle = oracle_values(model, sequences, folder)
    launches = {ranks: [str(folder), ",".join(names)] for ranks, names in RANKS.items()}
    failures = run_launches("layouts.py", launches, timeout_seconds=800)
    results = Results(folder, RANKS, failures)
    results["oracle"] = oracle
    return results


def test_no_rank_fails(results):
    assert not results.failures


def oracle_values(model, sequences: list[np.ndarray], folder: Path) -> dict:
    """Logits, logprobs and the GRPO gradient by transformers and autograd; writes the sequences that go with them."""
    rng = np.random.default_rng(1)
    stored: dict[str, np.ndarray] = {"count": np.array(len(sequences))}
    logprobs = []
    loss = torch.zeros(())
    for i, ids in enumerate(sequences):
        tokens = torch.from_numpy(ids.astype(np.int64))
        scores = torch.log_softmax(model(tokens[None]).logits[0, :-1].float(), dim=-1)
        own = torch.cat([torch.zeros(1), scores.gather(1, tokens[1:, None]).squeeze(1)])
        mask = np.arange(len(ids)) >= 3
        weight = np.where(mask, 1.0 / (len(sequences) * mask.sum()), 0.0).astype(np.float32)
        old = np.where(mask, own.detach().numpy() + rng.normal(0, 0.25, len(ids)), 0).astype(np.float32)
        reference = np.where(mask, own.detach().numpy() + rng.normal(0, 0.5, len(ids)), 0).astype(np.float32)
        advantage = float(rng.normal())
        # The formulas of the paper written out, independently of megatron_r1.grpo.
        ratio = torch.exp(own - torch.from_numpy(old))
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
        gap = torch.from_numpy(reference) - own
        token_loss = -surrogate + KL * (torch.exp(gap) - gap - 1)
        loss = loss + (torch.from_numpy(weight) * token_loss).sum()
        logprobs.append(np.where(mask, own.detach().numpy(), 0))
        fields = {"token_ids": ids, "loss_mask": mask, "token_weight": weight, "advantage": np.array(advantage)}
        fields |= {"old_logprobs": old, "reference_logprobs": reference, "behaviour_logprobs": old}
        stored |= {f"{i}.{name}": value for name, value in fields.items()}
    loss.backward()
    np.savez(folder / "sequences.npz", **stored)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": all_logits(model, sequences), "logprobs": logprobs, "gradients": gradients}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_logits_equal_transformers(results, layout):
    for i, expected in enumerate(results["oracle"]["logits"]):
        np.testing.assert_allclose(results[layout][f"logits_{i}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpacked_logits_equal_transformers(results, layout):
    np.testing.assert_allclose(results[layout]["unpacked_logits"], results["oracle"]["logits"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_equal_transformers(results, layout):
    for i, expected in enumerate(results["oracle"]["logprobs"]):
        np.testing.assert_allclose(results[layout][f"logprobs_{i}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grpo_gradients_equal_transformers_autograd(results, layout):
    """Relative to each tensor's largest gradient; every parameter of the decoder has one."""
    expected = hf_gradients(results["oracle"]["gradients"])
    computed = {key.split(":")[1]: value for key, value in results[layout].items() if key.startswith("gradient:")}
    assert set(expected) <= set(computed)
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(computed[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_gradients_agree_with_one_rank(results, layout):
    one = {key: value for key, value in results["one"].items() if key.startswith("gradient:")}
    for key, gradient in one.items():
        scale = max(np.abs(gradient).max(), 1e-12)
        np.testing.assert_allclose(results[layout][key] / scale, gradient / scale, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_weights_are_the_folders_bit_for_bit(results, layout):
    assert results[layout]["export_difference"] == 0.0


def hf_gradients(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 stacks experts in memory (gate_up_proj, down_proj); checkpoints have one tensor an expert."""
    split = {}
    for name, value in gradients.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = np.split(both, 2)
                split[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                split[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(value):
                split[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            split[name] = value
    return split
