"""Optimizer steps against torch.optim.AdamW on the transformers model; MTP against its formula; the reference copy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import save_model
from ranks import run_launches, run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("policy")
    model = save_model("deepseek_v3", root, mtp_layers=1)
    for said in run_launches("policy.py", {1: [str(root)], 2: [str(root)]}).values():
        raise AssertionError(said)
    return {"root": root, "model": model, 1: dict(np.load(root / "found1.npz")), 2: dict(np.load(root / "found2.npz"))}


def worker_sequences(count: int, seed: int):
    """The worker's own batches, without importing it (it patches torch)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        length = int(rng.integers(8, 60))
        yield rng.integers(0, 101, length).astype(np.int64)


@pytest.fixture(scope="module")
def adamw(results) -> dict:
    """The same four steps by torch.optim.AdamW: lr from 1e-3 to 1e-4 over ten steps, clip 1, decay 0.1 on matrices."""
    model = results["model"]
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 + (1e-3 - 1e-4) * (1 - step / 10)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for ids in worker_sequences(6, step):
            tokens = torch.from_numpy(ids)
            scores = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None])[1:]
            loss = loss - scores.sum() / (6 * (len(ids) - 2))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(float(loss))
        optimizer.step()
    after = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    model.load_state_dict(start)
    return {"loss": losses, "grad_norm": norms, "weights": after}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optimizer", ["plain", "sharded"])
def test_steps_equal_adamw_on_transformers(results, adamw, ranks, optimizer):
    found = results[ranks]
    np.testing.assert_allclose(found[f"{optimizer}.rate"], [1e-3, 9.1e-4, 8.2e-4, 7.3e-4], rtol=1e-6)
    np.testing.assert_allclose(found[f"{optimizer}.loss"], adamw["loss"], rtol=2e-4)
    np.testing.assert_allclose(found[f"{optimizer}.grad_norm"], adamw["grad_norm"], rtol=2e-3)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.gate.weight", "model.norm.weight"):
        moved = np.abs(adamw["weights"][name] - found[f"{optimizer}:{name}"])
        assert np.median(moved) < 2e-5, name  # four steps move a weight by up to 3.4e-3
        assert moved.max() < 2e-3, name


@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_optimizer_equals_the_plain_one(results, ranks):
    found = results[ranks]
    names = [key.split(":", 1)[1] for key in found if key.startswith("plain:")]
    assert len(names) > 100
    for name in names:
        np.testing.assert_allclose(found[f"sharded:{name}"], found[f"plain:{name}"], atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def dense(results, tmp_path_factory) -> dict:
    """The same for a decoder of dense layers alone: its MTP layer, from first_k_dense_replace on, has experts."""
    root = tmp_path_factory.mktemp("dense")
    model = save_without_experts(results["root"], root)
    run_ranks("policy.py", str(root), "mtp", ranks=1)
    return {"root": root, "model": model, 1: dict(np.load(root / "found1.npz"))}


def save_without_experts(source: Path, root: Path):
    """`source` with layer 0's feed-forward part in all four decoder layers, as transformers reads it."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    weights = load_file(source / "model.safetensors")
    for layer in range(1, 4):
        mlp = f"model.layers.{layer}.mlp."
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(mlp)}
        for part in ("gate_proj", "up_proj", "down_proj"):
            tensor = weights[f"model.layers.0.mlp.{part}.weight"]
            weights[f"{mlp}{part}.weight"] = tensor + torch.randn_like(tensor) * 0.02
    save_file(weights, root / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"first_k_dense_replace": 4}
    (root / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()


def test_an_mtp_layer_behind_dense_layers_has_experts(dense):
    check_mtp_scores(dense, 1)
    names = set(dense[1]["mtp.names"])
    assert "model.layers.4.mlp.experts.7.down_proj.weight" in names and "model.layers.4.mlp.gate.weight" in names
    assert "model.layers.3.mlp.down_proj.weight" in names


@pytest.mark.parametrize("ranks", [1, 2])
def test_mtp_layer_scores_the_token_after_next(results, ranks):
    """h' = layer(W [enorm(embed(t+1)); hnorm(h_t)]), logprob of token t + 2 (DeepSeek-V3, section 2.2), by
    transformers' own decoder layer."""
    check_mtp_scores(results, ranks)


def check_mtp_scores(results: dict, ranks: int) -> None:
    found, model = results[ranks], results["model"]
    expected = [mtp_logprobs(results["root"], model, found[f"mtp.ids{i}"]) for i in range(2)]
    for start, index in zip(found["mtp.cu_seqlens"], found["mtp.order"], strict=False):
        length = len(expected[index])
        np.testing.assert_allclose(
            found["mtp.logprobs"][0, start : start + length], expected[index], atol=2e-5, rtol=1e-5
        )
        weights = found["mtp.weights"][0, start : start + length + 2]
        # tokens 0 and 1 are the prompt: the first scored token is 2, which position 0 predicts; nothing past the end
        assert (weights[:length] > 0).all()
        assert (weights[length:] == 0).all()
    assert found["mtp.eh_proj_gradient"] > 0
    np.testing.assert_allclose(found["mtp.eh_proj_gradient.grpo"], found["mtp.eh_proj_gradient"], rtol=1e-5)


def mtp_logprobs(root: Path, model, ids: np.ndarray) -> np.ndarray:
    from safetensors.torch import load_file
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

    weights = load_file(root / "model.safetensors")
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    layer = DeepseekV3DecoderLayer(model.config, layer_idx=model.config.num_hidden_layers).eval()
    state = {}
    for name in layer.state_dict():
        if name.endswith("experts.gate_up_proj"):
            experts = range(model.config.n_routed_experts)
            state[name] = torch.stack(
                [
                    torch.cat([own[f"mlp.experts.{e}.gate_proj.weight"], own[f"mlp.experts.{e}.up_proj.weight"]])
                    for e in experts
                ]
            )
        elif name.endswith("experts.down_proj"):
            experts = range(model.config.n_routed_experts)
            state[name] = torch.stack([own[f"mlp.experts.{e}.down_proj.weight"] for e in experts])
        else:
            state[name] = own[name]
    layer.load_state_dict(state)
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        hidden = model.model(tokens[None]).last_hidden_state
        embedded = model.model.embed_tokens(torch.cat([tokens[1:], tokens[:1]])[None])

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * own[f"{name}.weight"]

        joined = torch.cat([norm(embedded, "enorm"), norm(hidden, "hnorm")], -1) @ own["eh_proj.weight"].T
        length = len(ids)
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        out = layer(
            joined, attention_mask=mask, position_ids=positions,
            position_embeddings=model.model.rotary_emb(joined, positions),
        )  # fmt: skip
        out = out[0] if isinstance(out, tuple) else out
        logits = norm(out, "shared_head.norm") @ model.lm_head.weight.T
        scores = torch.log_softmax(logits[0], -1)
    return scores[:-2].gather(1, tokens[2:, None]).squeeze(1).numpy()


@pytest.mark.parametrize("ranks", [1, 2])
def test_reference_weights_come_and_go(results, ranks):
    found = results[ranks]
    assert found["reference_is_start"]
    assert found["policy_moved"] > 1e-3
    assert found["weights_restored"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(results, ranks):
    found = results[ranks]
    assert found["skipped"]
    assert found["unchanged"]
    assert found["next_step_works"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_with_nothing_to_train_on_changes_nothing_and_counts(results, ranks):
    assert results[ranks]["rested"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_mtp_layer_that_the_folder_lacks_is_refused(results, ranks):
    """It would be trained, drafted with and exported as random numbers."""
    said = str(results[ranks]["missing_mtp"])
    assert "tensor model.layers.4.enorm.weight is missing" in said and "num_nextn_predict_layers" in said


def test_the_oracle_process_is_not_patched():
    """Workers patch torch for Megatron; the process that computes the expected values must not."""
    assert "megatron_r1.policy.platform" not in sys.modules
