"""Folders that are damaged, incomplete or hostile: one clear error that names file and tensor, and nothing written."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_checkpoint
from oracles import save_model
from safetensors.torch import load_file, save_file

from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.folders import open_checkpoint, read_shape
from megatron_r1.weights.torch_dist import read_metadata

TO_MEGATRON = ConvertOptions(target="torch_dist", workers=1)
TOOL = Path(__file__).parent.parent.parent / "tools" / "convert_checkpoint.py"


@pytest.fixture
def hf(tmp_path):
    save_model("deepseek_v3", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(hf, tmp_path):
    convert(hf, tmp_path / "sharded", ConvertOptions(target="hf", file_bytes=400_000, workers=1))
    return tmp_path / "sharded"


@pytest.fixture
def megatron(hf, tmp_path):
    convert(hf, tmp_path / "megatron", TO_MEGATRON)
    return tmp_path / "megatron"


def change(folder, **tensors):
    """Replace (or with None remove) tensors of a single-file folder."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    for name, tensor in tensors.items():
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, file)


def refused(source, tmp_path, *words, error=CheckpointError):
    """Converting raises an error with all words, and leaves nothing that looks like a checkpoint."""
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "out", TO_MEGATRON)
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert not (tmp_path / "out").exists()
    return message


NORM = "model.layers.1.input_layernorm.weight"


def test_a_truncated_shard(sharded, tmp_path):
    shard = sorted(sharded.glob("model-0*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(sharded, tmp_path, shard, "1,000 bytes are missing", "fetch it again")
    shard.write_bytes(b"")
    refused(sharded, tmp_path, shard, "truncated or not a safetensors file")


def test_a_shard_with_bytes_too_many(hf, tmp_path):
    with open(hf / "model.safetensors", "ab") as file:
        file.write(b"xx")
    refused(hf, tmp_path, "model.safetensors", "2 bytes too many")


def test_an_index_that_names_a_missing_file(sharded, tmp_path):
    shard = sorted(sharded.glob("model-0*"))[0]
    shard.unlink()
    refused(sharded, tmp_path, "model.safetensors.index.json", shard.name, "does not exist")


def test_an_index_that_promises_a_tensor_elsewhere(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    content["weight_map"]["model.embed_tokens.weight"] = files[-1]
    index.write_text(json.dumps(content))
    refused(sharded, tmp_path, files[-1], "model.embed_tokens.weight", "is missing")


@pytest.mark.parametrize("trick", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".."])
def test_path_tricks_in_an_index(sharded, tmp_path, trick):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NORM] = trick
    index.write_text(json.dumps(content))
    refused(sharded, tmp_path, NORM, "outside the folder", repr(trick))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(sharded, tmp_path, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, tmp_path, "model.safetensors.index.json")


def test_a_tensor_with_the_wrong_shape(hf, tmp_path):
    change(hf, **{NORM: torch.ones(63)})
    refused(hf, tmp_path, "model.safetensors", NORM, "[63]", "[64]")


def test_an_unknown_tensor(hf, tmp_path):
    change(hf, **{"model.layers.1.surprise.weight": torch.ones(3)})
    refused(hf, tmp_path, "model.layers.1.surprise.weight", "unknown", "deepseek_v3", "model.safetensors")


def test_a_missing_tensor(hf, tmp_path):
    change(hf, **{NORM: None})
    refused(hf, tmp_path, NORM, "missing")


def test_some_but_not_all_of_an_mtp_layer(tmp_path):
    save_model("deepseek_v3", tmp_path / "hf", mtp_layers=1)
    change(tmp_path / "hf", **{"model.layers.4.enorm.weight": None})
    refused(tmp_path / "hf", tmp_path, "model.layers.4.enorm.weight", "missing")


def test_an_mtp_layer_with_an_embedding_of_its_own(tmp_path):
    save_model("deepseek_v3", tmp_path / "hf", mtp_layers=1)
    other = torch.randn(101, 64)
    change(tmp_path / "hf", **{"model.layers.4.embed_tokens.weight": other})
    refused(tmp_path / "hf", tmp_path, "model.layers.4.embed_tokens.weight", "differs from model.embed_tokens.weight")


@pytest.mark.parametrize("field", ["hidden_size", "kv_lora_rank", "n_routed_experts", "rms_norm_eps", "model_type"])
def test_a_config_without_a_field(hf, tmp_path, field):
    config = json.loads((hf / "config.json").read_text())
    del config[field]
    (hf / "config.json").write_text(json.dumps(config))
    refused(hf, tmp_path, "config.json", field, error=ConfigError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_reported_and_kept_only_on_request(hf, tmp_path, value):
    bad = load_file(hf / "model.safetensors")[NORM]
    bad[3] = value
    change(hf, **{NORM: bad, "model.norm.weight": torch.full((64,), value)})
    message = refused(hf, tmp_path, NORM, "(1 numbers", "model.norm.weight (64 numbers", "model.safetensors")
    assert "--allow-nonfinite" in message
    allowed = ConvertOptions(target="torch_dist", workers=1, resume=True, allow_nonfinite=True)
    assert convert(hf, tmp_path / "out", allowed).nonfinite == {NORM: 1, "model.norm.weight": 64}


def test_precisions_that_do_not_fit_one_megatron_tensor(hf, tmp_path):
    stored = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    change(hf, **{name: stored[name].bfloat16()})
    refused(hf, tmp_path, name, "choose one precision")


# ---- FP8


@pytest.fixture
def fp8(tmp_path):
    make_checkpoint(tmp_path / "fp8", num_bytes=1, num_shards=1, fp8=True)
    index = tmp_path / "fp8" / "model.safetensors.index.json"
    next((tmp_path / "fp8").glob("model-*")).rename(tmp_path / "fp8" / "model.safetensors")
    index.unlink()
    return tmp_path / "fp8"


SCALED = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def test_scales_that_are_missing_or_of_another_shape(fp8, tmp_path):
    change(fp8, **{f"{SCALED}_scale_inv": None})
    refused(fp8, tmp_path, SCALED, "has no", "_scale_inv", "model.safetensors")
    change(fp8, **{f"{SCALED}_scale_inv": torch.ones(3, 7)})
    refused(fp8, tmp_path, f"{SCALED}_scale_inv", "[3, 7]", "[3, 8]")
    change(fp8, **{f"{SCALED}_scale_inv": torch.ones(3, 8), SCALED: torch.ones(272, 1024)})
    refused(fp8, tmp_path, f"{SCALED}_scale_inv", "no FP8 matrix")


def test_nan_in_fp8(fp8, tmp_path):
    codes = load_file(fp8 / "model.safetensors")[SCALED]
    codes.view(torch.uint8)[5, 5] = 0xFF
    change(fp8, **{SCALED: codes})
    refused(fp8, tmp_path, SCALED, "(1 numbers")


@pytest.mark.parametrize(
    "quantisation",
    [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8", "weight_block_size": [128, 64]},
     {"quant_method": "fp8", "weight_block_size": [0, 0]}, {"quant_method": "fp8"}, "fp8"],
)  # fmt: skip
def test_other_quantisations_are_refused(fp8, tmp_path, quantisation):
    config = json.loads((fp8 / "config.json").read_text()) | {"quantization_config": quantisation}
    (fp8 / "config.json").write_text(json.dumps(config))
    refused(fp8, tmp_path, "quantization_config", "weight_block_size", error=ConfigError)


# ---- headers that lie


def header_only(path, header, data=b"\0" * 16):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header,word",
    [
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, "does not fit"),
        ({"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, "does not fit"),
        ({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, "F99"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 16]}}, "not a safetensors header"),
        ({"a": 3}, "not a safetensors header"),
        (
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            "overlap",
        ),
    ],
)
def test_headers_that_lie(hf, tmp_path, header, word):
    header_only(hf / "model.safetensors", header)
    refused(hf, tmp_path, "model.safetensors", word)


def test_a_header_longer_than_the_file(hf, tmp_path):
    (hf / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    refused(hf, tmp_path, "truncated or not a safetensors file")


def test_pickles_are_not_weights(hf, tmp_path):
    (hf / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, hf / "pytorch_model.bin")
    refused(hf, tmp_path, "holds neither model.safetensors nor")


# ---- torch_dist


class Touch:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_hostile_metadata_runs_nothing(megatron, tmp_path):
    metadata = read_metadata(megatron)
    metadata.planner_data = Touch(tmp_path / "touched")
    (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    open_checkpoint(megatron, read_shape(megatron)).close()  # what it would have made is not needed
    assert not (tmp_path / "touched").exists()
    (megatron / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(CheckpointError, match="not the metadata"):
        open_checkpoint(megatron, read_shape(megatron))
    assert not (tmp_path / "touched").exists()
    pickle.loads((megatron / ".metadata").read_bytes())
    assert (tmp_path / "touched").exists()  # the trap works


def test_torch_dist_path_tricks(megatron):
    metadata = read_metadata(megatron)
    next(iter(metadata.storage_data.values())).relative_path = "../secret.distcp"
    (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(megatron, read_shape(megatron))


def test_torch_dist_cut_or_incomplete(megatron):
    file = megatron / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5000])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: truncated"):
        open_checkpoint(megatron, read_shape(megatron))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: does not exist"):
        open_checkpoint(megatron, read_shape(megatron))
    file.write_bytes(whole)
    metadata = read_metadata(megatron)
    del metadata.storage_data[next(iter(metadata.storage_data))]
    (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="not there as a whole"):
        open_checkpoint(megatron, read_shape(megatron))
    (megatron / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(CheckpointError, match="not the metadata"):
        open_checkpoint(megatron, read_shape(megatron))


def test_torch_dist_of_another_model(megatron, tmp_path):
    config = json.loads((megatron / "hf" / "config.json").read_text())
    for fields, word in (({"num_hidden_layers": 5}, "is missing"), ({"moe_intermediate_size": 31}, "has shape")):
        (megatron / "hf" / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(CheckpointError, match=word):
            open_checkpoint(megatron, read_shape(megatron))


def test_the_tool_says_it_without_a_traceback(hf, tmp_path):
    (hf / "model.safetensors").write_bytes(b"short")
    for words in (
        ("hf-to-megatron", hf, tmp_path / "out"),
        ("inspect", hf),
        ("verify", hf, hf),
        ("inspect", tmp_path / "no"),
    ):
        command = [sys.executable, str(TOOL), *(str(word) for word in words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, (
            done.stderr
        )
