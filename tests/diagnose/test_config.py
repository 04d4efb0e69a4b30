"""What megatron-r1 diagnose refuses before anything is started."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import refusals
from safetensors.numpy import save_file

from megatron_r1.__main__ import main
from megatron_r1.config import ParallelConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.diagnose.config import DiagnoseConfig, DiagnosedServer, differing_fields, validate_diagnose
from megatron_r1.recipes.tiny import TINY_V3

DENSE = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 96, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def folder_of(path: Path, fields: dict | None = None, *, weights: bool = True) -> Path:
    """A model folder whose weights nobody reads."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(DENSE | (fields or {})))
    if weights:
        save_file({"lm_head.weight": np.zeros(1, np.float32)}, path / "model.safetensors")
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return folder_of(tmp_path / "served")


def faults_of(folder: Path, **fields) -> list[str]:
    """Those of a configuration on a CPU."""
    known = {"folder": folder, "device": "cpu", "tokens": 16}
    return refusals.faults_of(validate_diagnose, DiagnoseConfig(**{**known, **fields}))


def only_fault(*given, **fields) -> str:
    (fault,) = faults_of(*given, **fields)
    return fault


def test_a_folder_alone_is_enough(folder) -> None:
    config = DiagnoseConfig(folder=folder, device="cpu", tokens=16)
    assert validate_diagnose(config).num_layers == 2
    assert config.model_folder == folder and not config.is_run_checkpoint
    assert (config.server.max_model_len, config.server.dtype, config.train.dtype) == (17, "bf16", "bf16")


def test_rows_have_room_for_the_layouts_padding(folder) -> None:
    parallel = ParallelConfig(tensor=2, context=2, sequence=True, world_size=4)
    config = DiagnoseConfig(folder=folder, device="cpu", tokens=17, parallel=parallel)
    assert config.train.tokens_per_microbatch == 20


def test_a_folder_that_is_not_there_is_one_fault(tmp_path) -> None:
    assert only_fault(tmp_path / "none").startswith("folder: ")


def test_a_folder_without_weights_is_refused(tmp_path) -> None:
    fault = only_fault(folder_of(tmp_path / "bare", weights=False))
    assert "holds no *.safetensors" in fault and "tools/convert_checkpoint.py" in fault


def test_a_trainer_folder_without_weights_is_refused(folder, tmp_path) -> None:
    fault = only_fault(folder, trainer_folder=folder_of(tmp_path / "bare", weights=False))
    assert fault.startswith("trainer_folder: ") and "holds no weights" in fault


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 3}, "num_layers 3, and"),
        ({"hidden_size": 128}, "head_dim 32, and"),
        ({"vocab_size": 97}, "vocab_size 97, and"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "architecture llama, and"),
        ({"intermediate_size": 64, "num_hidden_layers": 1}, "num_layers 1, and"),
    ],
)
def test_a_trainer_of_another_shape_is_one_fault(folder, tmp_path, fields, words) -> None:
    fault = only_fault(folder, trainer_folder=folder_of(tmp_path / "other", fields))
    assert fault.startswith("trainer_folder: ") and "another shape" in fault and words in fault


def test_a_trainer_with_other_numbers_of_the_same_shape_is_compared(folder, tmp_path) -> None:
    other = folder_of(tmp_path / "other", {"rope_theta": 500.0, "rms_norm_eps": 1e-5})
    trained = validate_diagnose(DiagnoseConfig(folder=folder, trainer_folder=other, device="cpu", tokens=16))
    served = validate_diagnose(DiagnoseConfig(folder=folder, device="cpu", tokens=16))
    assert differing_fields(served, trained) == {"norm_eps": (1e-6, 1e-5), "rope.theta": (10000.0, 500.0)}
    assert differing_fields(served, served) == {}


def test_a_runs_checkpoint_has_the_served_folders_shape(folder, tmp_path) -> None:
    step = tmp_path / "step_00000004"
    step.mkdir()
    (step / "policy.json").write_text("{}")
    save_file({"a": np.zeros(1, np.float32)}, step / "state-00000.safetensors")
    config = DiagnoseConfig(folder=folder, trainer_folder=step, device="cpu", tokens=16)
    assert config.is_run_checkpoint and validate_diagnose(config).hidden_size == 64


def test_more_tokens_than_positions_are_refused(folder) -> None:
    assert "max_position_embeddings = 64" in only_fault(folder, tokens=64)
    assert faults_of(folder, tokens=63) == []


def test_too_few_tokens_are_refused(folder) -> None:
    assert "tokens is 2" in only_fault(folder, tokens=2)


def test_a_reward_model_is_refused(tmp_path) -> None:
    fields = {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}
    assert "is a reward model" in only_fault(folder_of(tmp_path / "reward", fields))


def test_an_fp8_folder_is_refused(tmp_path) -> None:
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    assert "is FP8" in only_fault(folder_of(tmp_path / "fp8", {"quantization_config": quantised}))


def test_layouts_of_both_sides_are_checked(folder) -> None:
    found = faults_of(
        folder, parallel=ParallelConfig(expert=2, world_size=2), rollout=DiagnosedServer(tensor_parallel=3)
    )
    assert any(fault.startswith("parallel.expert is 2; qwen2 has no experts") for fault in found)
    assert any(fault.startswith("rollout.tensor_parallel is 3") for fault in found)


def test_a_text_that_is_not_there_is_a_fault(folder, tmp_path) -> None:
    assert only_fault(folder, text=tmp_path / "none.txt") == f"text: {tmp_path / 'none.txt'} does not exist"


@pytest.mark.parametrize("content", [b"\xff\xfea text of another encoding", None], ids=["bytes", "folder"])
def test_a_text_that_is_none_is_a_fault(folder, tmp_path, content) -> None:
    """Else a rank would say so, in its own words, when all have started."""
    file = tmp_path / "prompt"
    file.mkdir() if content is None else file.write_bytes(content)
    fault = only_fault(folder, text=file)
    assert fault.startswith(f"text: {file} ") and ("UTF-8" in fault or content is None)


def test_numbers_that_could_not_be_written_are_not_waited_for(folder, tmp_path) -> None:
    assert faults_of(folder, json=tmp_path / "found.json") == []
    for place in (tmp_path, tmp_path / "none" / "found.json"):
        assert only_fault(folder, json=place).startswith(f"json: {place} cannot be written")


def test_a_recording_of_other_experts_is_refused(tmp_path) -> None:
    served = load_shape(TINY_V3)
    assert served.moe is not None and not served.is_moe_layer(0) and served.is_moe_layer(1)
    tensors = {"model.embed_tokens": np.zeros((5, served.hidden_size), np.float32)}
    tensors |= {"lm_head": np.zeros((4, served.vocab_size), np.float32), "logprobs": np.zeros(5, np.float32)}
    tensors |= {"token_ids": np.zeros(5, np.int64), "model.layers.3.mlp": np.zeros((5, 8), np.float32)}
    for experts in (served.moe.num_experts, served.moe.num_experts + 1):
        gates = {f"model.layers.{layer}.mlp.gate": np.zeros((5, experts), np.float32) for layer in (1, 2, 3)}
        save_file(tensors | gates, tmp_path / str(experts))
    config = DiagnoseConfig(folder=TINY_V3, device="cpu", dtype="fp32")

    def said(experts: int) -> list[str]:
        found = refusals.faults_of(validate_diagnose, dataclasses.replace(config, recording=tmp_path / str(experts)))
        return [fault for fault in found if fault.startswith("recording: ")]

    assert said(served.moe.num_experts) == []
    (fault,) = said(served.moe.num_experts + 1)
    assert "has model.layers.1.mlp.gate with 9 columns, and" in fault and fault.endswith(" 8")


def recorded(path: Path, *, hidden: int = 64, layers: int = 2, dtype=np.float32) -> Path:
    tensors = {"model.embed_tokens": np.zeros((5, hidden), dtype), "lm_head": np.zeros((4, 96), dtype)}
    tensors |= {f"model.layers.{layer}.mlp": np.zeros((5, hidden), dtype) for layer in range(layers)}
    save_file(tensors | {"logprobs": np.zeros(5, np.float32), "token_ids": np.zeros(5, np.int64)}, path)
    return path


def test_a_recording_brings_its_tokens(folder, tmp_path) -> None:
    config = DiagnoseConfig(
        folder=folder, device="cpu", dtype="fp32", tokens=1000, recording=recorded(tmp_path / "recording")
    )
    assert validate_diagnose(config).num_layers == 2
    assert config.train.tokens_per_microbatch == 5


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"hidden": 32}, "model.embed_tokens with 32 columns, and"),
        ({"layers": 1}, "none of a model of 2 layers (it lacks model.layers.1.mlp)"),
        ({"layers": 3}, "none of a model of 2 layers (it has model.layers.2.mlp)"),
        ({"dtype": np.float16}, "dtype is fp32, and"),
    ],
)
def test_a_recording_of_another_model_is_refused(folder, tmp_path, made, words) -> None:
    file = recorded(tmp_path / "recording", **made)
    assert words in only_fault(folder, dtype="fp32", recording=file)


def test_what_is_no_recording_is_refused(folder, tmp_path) -> None:
    assert "does not exist" in only_fault(folder, recording=tmp_path / "none")
    (tmp_path / "text").write_text("no tensors in here")
    assert "not a safetensors file" in only_fault(folder, recording=tmp_path / "text")


def test_the_command_says_all_faults_at_once_and_starts_nothing(tmp_path, capsys) -> None:
    folder = folder_of(tmp_path / "bare", weights=False)
    assert main(["diagnose", str(folder), "--device", "cpu", "--tokens", "500"]) == 2
    said = capsys.readouterr().err
    assert "2 faults" in said and "holds no *.safetensors" in said and "max_position_embeddings = 64" in said


def test_a_rank_of_an_outer_launcher_needs_a_shared_folder(folder, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["diagnose", str(folder), "--device", "cpu", "--tokens", "16"]) == 2
    assert "run_dir is not given" in capsys.readouterr().err


def test_faults_are_found_without_torch() -> None:
    code = (
        "import sys\n"
        "from megatron_r1.__main__ import main\n"
        f"assert main(['diagnose', {str(TINY_V3)!r}, '--device', 'cpu']) == 2\n"
        "print([name for name in ('torch', 'transformers', 'vllm', 'megatron.core') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
