"""The command itself, with a server of its own, for other architectures than the shared server's, and in bf16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diagnosis import departing, diagnoses, planted, swap
from oracles import SMALL, save_model, write_tokenizer

NUM_TOKENS = 64
WIDE_HEADS = {"hidden_size": 128, "head_dim": 32}
"""vLLM's attention on CPU has no head of 16."""

Q_NORM, K_NORM = (f"model.layers.1.self_attn.{name}_norm.weight" for name in "qk")
ROUTER = "model.layers.0.mlp.gate.weight"


def saved(name: str, folder: Path, *, mtp_layers: int = 0) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for field, value in WIDE_HEADS.items():
            patch.setitem(SMALL, field, value)
        save_model(name, folder, mtp_layers=mtp_layers)
    write_tokenizer(folder)
    return folder


def command(folder: Path, run_dir: Path, *words: str, status: int = 0) -> tuple[str, dict]:
    """What `megatron-r1 diagnose` prints, and writes with --json."""
    file = run_dir.with_suffix(".json")
    given = ["--device", "cpu", "--tokens", str(NUM_TOKENS), "--run-dir", str(run_dir), "--json", str(file), *words]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1", "diagnose", str(folder), *given],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr, json.loads(file.read_text())


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory) -> tuple[Path, Path, str, dict]:
    """(folder, recording in bf16, what the command said, what it wrote)."""
    root = tmp_path_factory.mktemp("qwen3_moe")
    folder = saved("qwen3_moe", root / "model")
    said, found = command(folder, root / "run", "--dtype", "bf16")
    return folder, root / "run" / "recording.safetensors", said, found


def test_the_command_in_bf16(qwen3_moe) -> None:
    *_, said, found = qwen3_moe
    assert "vLLM and Megatron agree in every module" in said and "layer 1" in said
    assert departing(found) == [] and found["tokens"] == NUM_TOKENS and found["dtype"] == "bf16"
    differences = {module["name"]: module["difference"] for module in found["modules"]}
    # Rounding is there to be seen, and is well below the bound, also where it has grown over the layers.
    assert 1e-4 < max(differences.values()) < 2**-6
    assert found["hidden_differences"][-1] > max(differences.values()) / 4
    assert differences["model.embed_tokens"] == 0
    assert "model.layers.0.mlp.experts" in differences and "model.layers.1.mlp.gate" in differences


@pytest.fixture(scope="module")
def faults(qwen3_moe, tmp_path_factory) -> dict[str, dict]:
    folder, recording, _, _ = qwen3_moe
    root = tmp_path_factory.mktemp("faults")

    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ROUTER][5] = -tensors[ROUTER][5]

    transposed = "model.layers.0.mlp.experts.2.down_proj.weight"
    trainers = {
        "q and k norm swapped": planted(folder, root / "norms", swap(Q_NORM, K_NORM)),
        "a row of the router": planted(folder, root / "router", other),
        "rope base": planted(
            folder, root / "rope", fields={"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
        ),
        "top_k not normalised": planted(folder, root / "weights", fields={"norm_topk_prob": False}),
        "transposed expert": planted(
            folder,
            root / "expert",
            lambda tensors: tensors.update(
                {transposed: tensors[transposed].T.contiguous().view(tensors[transposed].shape)}
            ),
        ),
    }
    words = ["--folder", folder, "--recording", recording, "--device", "cpu", "--dtype", "bf16"]
    cases = {name: ("one", [*words, "--trainer-folder", path]) for name, path in trainers.items()}
    cases |= {f"none {layout}": (layout, words) for layout in ("one", "tp2", "ep2", "pp2")}
    cases["q and k norm swapped tp2"] = ("tp2", [*words, "--trainer-folder", trainers["q and k norm swapped"]])
    return diagnoses(root, cases)


@pytest.mark.parametrize(
    ("fault", "modules"),
    [
        ("q and k norm swapped", ["model.layers.1.self_attn"]),
        ("q and k norm swapped tp2", ["model.layers.1.self_attn"]),
        ("a row of the router", ["model.layers.0.mlp.gate"]),
        ("rope base", ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        ("top_k not normalised", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("transposed expert", ["model.layers.0.mlp"]),
        *((f"none {layout}", []) for layout in ("one", "tp2", "ep2", "pp2")),
    ],
)
def test_a_fault_is_found_through_the_rounding_of_bf16(faults, fault, modules) -> None:
    assert departing(faults[fault]) == modules


def test_the_tensors_that_differ_are_told(faults) -> None:
    assert faults["q and k norm swapped"]["unlike_tensors"] == [Q_NORM, K_NORM]
    assert faults["transposed expert"]["unlike_tensors"] == ["model.layers.0.mlp.experts.2.down_proj.weight"]
    (module,) = (module for module in faults["transposed expert"]["modules"] if module["departs"])
    assert 2 in module["experts"]


# ---- each with a server of its own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("deepseek_v3", "bf16"), ("qwen3_moe", "fp32"), ("deepseek_v2", "fp32")]
    + [(name, dtype) for name in ("qwen2", "qwen3", "llama") for dtype in ("fp32", "bf16")],
)
def test_both_sides_agree(name, dtype, tmp_path) -> None:
    said, found = command(saved(name, tmp_path / "model"), tmp_path / "run", "--dtype", dtype)
    assert departing(found) == [] and "agree in every module" in said
    limit = 2e-6 if dtype == "fp32" else 2**-6
    assert max(module["difference"] for module in found["modules"]) < limit


@pytest.mark.slow
def test_more_layouts_of_a_model_with_an_mtp_layer(tmp_path) -> None:
    folder = saved("deepseek_v3", tmp_path / "model", mtp_layers=1)
    _, found = command(folder, tmp_path / "run", "--dtype", "fp32")
    assert departing(found) == []
    norm = "model.layers.3.self_attn.q_a_layernorm.weight"
    other = planted(folder, tmp_path / "other", lambda tensors: tensors[norm].mul_(1.01))
    words = ["--folder", folder, "--recording", tmp_path / "run" / "recording.safetensors"]
    words += ["--device", "cpu", "--dtype", "fp32"]
    layouts = ("dp2", "vpp2", "tp2pp2ep2", "cp2tp2ep2")
    cases = {f"none {layout}": (layout, words) for layout in layouts}
    cases |= {f"norm {layout}": (layout, [*words, "--trainer-folder", other]) for layout in layouts}
    for name, answer in diagnoses(tmp_path, cases).items():
        assert departing(answer) == ([] if name.startswith("none") else ["model.layers.3.self_attn"]), name
        assert len(answer["modules"]) == len(found["modules"]), name


@pytest.mark.slow
def test_a_text_under_two_ranks_and_a_server_over_two(tmp_path) -> None:
    (tmp_path / "text").write_text(" ".join(f"w{number % 97 + 3}" for number in range(500)))
    folder = saved("qwen3_moe", tmp_path / "model")
    (tmp_path / "run" / ".rendezvous").mkdir(parents=True)  # as a killed diagnosis leaves it
    words = ["--text", str(tmp_path / "text"), "--dtype", "fp32", "--rollout.tensor-parallel", "2"]
    words += ["--parallel.expert", "2", "--parallel.world-size", "2"]
    _, found = command(folder, tmp_path / "run", *words)
    assert departing(found) == [] and found["tokens"] == NUM_TOKENS
    assert max(module["difference"] for module in found["modules"]) < 2e-6


@pytest.mark.slow
def test_a_fault_ends_the_command_with_status_1(tmp_path) -> None:
    folder = saved("llama", tmp_path / "model")
    other = planted(folder, tmp_path / "other", lambda tensors: tensors["model.norm.weight"].mul_(1.1))
    said, found = command(folder, tmp_path / "run", "--dtype", "fp32", "--trainer-folder", str(other), status=1)
    assert departing(found) == ["model.norm"] and found["unlike_tensors"] == ["model.norm.weight"]
    assert "megatron-r1: the first module that departs is model.norm" in said
    assert sorted(path.name for path in (tmp_path / "run").glob("*.safetensors")) == ["recording.safetensors"]
