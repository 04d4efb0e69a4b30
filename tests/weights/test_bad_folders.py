"""Folders that are damaged, incomplete or hostile: one clear error that names file and tensor, and nothing written."""

import json
import os
import shutil
import struct

import convert_checkpoint
import pytest
import torch
from make_checkpoint import make_checkpoint
from oracles import save_model
from safetensors.torch import load_file, save_file

from megatron_r1.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_r1.config.model_folder import mtp_left_out
from megatron_r1.config.shape import load_shape
from megatron_r1.config.trainer_faults import train_faults
from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.fp8 import FP8
from megatron_r1.weights.inspect import describe
from megatron_r1.weights.manifest import MANIFEST

TO_MEGATRON = ConvertOptions(target="torch_dist", workers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    save_model("deepseek_v3", folder / "hf")
    convert(folder / "hf", folder / "sharded", ConvertOptions(target="hf", file_bytes=400_000, workers=1))
    (folder / "sharded" / MANIFEST).unlink()
    make_checkpoint(folder / "fp8", num_bytes=1, num_shards=1, fp8=True)
    (folder / "fp8" / "model.safetensors.index.json").unlink()
    next((folder / "fp8").glob("model-*")).rename(folder / "fp8" / "model.safetensors")
    return folder


@pytest.fixture
def hf(made, tmp_path):
    return shutil.copytree(made / "hf", tmp_path / "hf")


@pytest.fixture
def sharded(made, tmp_path):
    return shutil.copytree(made / "sharded", tmp_path / "sharded")


@pytest.fixture
def fp8(made, tmp_path):
    return shutil.copytree(made / "fp8", tmp_path / "fp8")


def change(folder, **tensors):
    """Replace (or with None remove) tensors of a single-file folder."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    for name, tensor in tensors.items():
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, file)


def refused(source, tmp_path, *words, error: type[Exception] = CheckpointError):
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


@pytest.mark.parametrize(
    "content", ["{", "[" * 200_000, "[]", '{"weight_map": 3}', '{"metadata": {}}', '{"weight_map": {"a": 1}}']
)
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


def test_an_mtp_layer_whose_embedding_has_another_dtype(tmp_path):
    save_model("deepseek_v3", tmp_path / "hf", mtp_layers=1)
    change(tmp_path / "hf", **{"model.layers.4.embed_tokens.weight": torch.randn(101, 64).half()})
    refused(tmp_path / "hf", tmp_path, "model.layers.4.embed_tokens.weight is torch.float16", "one tensor for both")


@pytest.mark.parametrize("field", ["hidden_size", "kv_lora_rank", "n_routed_experts", "vocab_size", "model_type"])
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


def test_pipes_are_not_read(hf, tmp_path):
    (hf / "model.safetensors").unlink()
    os.mkfifo(hf / "model.safetensors")
    refused(hf, tmp_path, "holds neither model.safetensors nor")


def test_a_tensor_in_two_shards_and_one_that_the_index_forgets(sharded, tmp_path):
    first, *_, last = sorted(sharded.glob("model-0*"))
    stored, name = load_file(last), next(iter(load_file(first)))
    save_file(stored | {name: torch.zeros(3)}, last)
    refused(sharded, tmp_path, last, f"{name} lies here and in {first.name}")
    save_file(stored | {"evil.weight": torch.zeros(3)}, last)
    refused(sharded, tmp_path, "evil.weight", "unknown", last.name)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, FP8, torch.float8_e5m2])
def test_a_dtype_that_is_no_weights(hf, tmp_path, dtype):
    change(hf, **{NORM: torch.ones(64).to(dtype)})
    refused(hf, tmp_path, "model.safetensors", NORM, f"is {dtype}", "quantization_config")


def test_a_side_file_that_leads_out_of_the_folder(hf, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (hf / "LICENSE").symlink_to(tmp_path / "secret")
    refused(hf, tmp_path, hf / "LICENSE", "outside the folder")


def test_what_travels_with_the_weights(hf, tmp_path):
    """From a folder of Hugging Face's cache, which is all links."""
    config = json.loads((hf / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_x.X"}}
    (hf / "config.json").write_text(json.dumps(config))
    sides = ("tokenizer.model.v3", "vocab.bpe", "additional_chat_templates/rag.jinja", "LICENSE", "merges.txt")
    (hf / "additional_chat_templates").mkdir()
    for name in (*sides, "modeling_x.py", "tokenizer_x.py", "pytorch_model.bin"):
        (hf / name).write_text(name)
    os.mkfifo(hf / "pipe.json")
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in hf.rglob("*") if path.is_file()):
        blob = tmp_path / "cache" / "blobs" / f"blob{number}"
        file.rename(blob)
        link = snapshot / file.relative_to(hf)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    convert(snapshot, tmp_path / "megatron", TO_MEGATRON)
    convert(tmp_path / "megatron", tmp_path / "back", ConvertOptions(target="hf", workers=1))
    for name in sides:
        assert (tmp_path / "back" / name).read_text() == name
    assert "auto_map" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert not list((tmp_path / "back").glob("*.py")) and not list((tmp_path / "back").glob("*.bin"))


# ---- FP8


SCALED = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def test_scales_that_are_missing_or_of_another_shape(fp8, tmp_path):
    change(fp8, **{f"{SCALED}_scale_inv": None})
    refused(fp8, tmp_path, SCALED, "has no", "_scale_inv", "model.safetensors")
    change(fp8, **{f"{SCALED}_scale_inv": torch.ones(3, 7)})
    refused(fp8, tmp_path, f"{SCALED}_scale_inv", "[3, 7]", "[2, 3]")
    change(fp8, **{f"{SCALED}_scale_inv": torch.ones(2, 3), SCALED: torch.ones(192, 320)})
    refused(fp8, tmp_path, f"{SCALED}_scale_inv", "no FP8 matrix")


def test_nan_in_fp8(fp8, tmp_path):
    codes = load_file(fp8 / "model.safetensors")[SCALED]
    codes.view(torch.uint8)[5, 5] = 0xFF
    change(fp8, **{SCALED: codes})
    refused(fp8, tmp_path, SCALED, "(1 numbers")


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7FC00000, 0x7F800000])
def test_nan_and_infinite_scales(fp8, tmp_path, bits):
    """All bits ones is NaN too: rounding to bf16 must not make 0 of it."""
    change(fp8, **{f"{SCALED}_scale_inv": torch.full((2, 3), bits, dtype=torch.int32).view(torch.float32)})
    refused(fp8, tmp_path, SCALED, "numbers", "--allow-nonfinite", "out.partial")


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
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
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
        ({"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}}, "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 16]}}, "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}}, "not a safetensors header"),
        ({"a": {"dtype": [], "shape": [4], "data_offsets": [0, 16]}}, "not a safetensors header"),
        (b"[" * 200_000, "not a safetensors header"),
        (b"[]", "not a safetensors header"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
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


def test_the_tool_says_it_without_a_traceback(hf, tmp_path, capsys):
    (hf / "model.safetensors").write_bytes(b"short")
    for words in (
        ("hf-to-megatron", hf, tmp_path / "out"),
        ("inspect", hf),
        ("verify", hf, hf),
        ("inspect", tmp_path / "no"),
    ):
        status = convert_checkpoint.main([str(word) for word in words])
        said = capsys.readouterr()
        assert status == 2 and not said.out and len(said.err.splitlines()) == 1, said.err


@pytest.mark.parametrize("words", [("--file-gb", "inf"), ("--file-gb", "nan"), ("--file-gb", "0"), ("--workers", "0")])
def test_odd_options_are_refused(hf, tmp_path, words):
    with pytest.raises(SystemExit) as caught:
        convert_checkpoint.main(["hf-to-hf", str(hf), str(tmp_path / "out"), *words])
    assert caught.value.code == 2
    with pytest.raises(SystemExit):
        convert_checkpoint.main(["hf-to-megatron", str(hf), str(tmp_path / "out"), "--file-gb", "1"])
    with pytest.raises(CheckpointError, match="file_bytes is 0; it must be at least 1"):
        convert(hf, tmp_path / "out", ConvertOptions(target="hf", file_bytes=0))


# ---- what lies beside the weights


def promise_mtp(folder, layers):
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_saved_by_transformers_has_no_mtp_layers(hf, sharded, tmp_path, capsys):
    """Loader, converter, planner and inspect agree, say so, and what is written promises none."""
    for folder in (hf, sharded):
        promise_mtp(folder, 0)
        assert load_shape(folder).num_mtp_layers == 0 and mtp_left_out(folder) is None
        promise_mtp(folder, 2)
        assert load_shape(folder).num_mtp_layers == 0
        assert "model.layers.4.* to model.layers.5.* are not among the weights" in (mtp_left_out(folder) or "")
        assert "the model goes without" in describe(folder)
        target = tmp_path / f"{folder.name}-converted"
        assert convert_checkpoint.main(["hf-to-megatron", str(folder), str(target), "--workers", "1"]) == 0
        assert "the model goes without" in capsys.readouterr().out
        assert json.loads((target / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    faults = train_faults(TrainConfig(), ParallelConfig(), ModelConfig(path=hf, train_mtp=True), load_shape(hf))
    assert any("train_mtp is True" in fault and "model.layers.4.*" in fault for fault in faults), faults


def test_tensors_that_the_index_forgets_are_there_all_the_same(tmp_path):
    save_model("deepseek_v3", tmp_path / "hf", mtp_layers=1)
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "model-1.safetensors")
    names = [name for name in load_file(tmp_path / "hf" / "model-1.safetensors") if ".layers.4." not in name]
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_shape(tmp_path / "hf").num_mtp_layers == 1
    convert(tmp_path / "hf", tmp_path / "out", TO_MEGATRON)
    assert json.loads((tmp_path / "out" / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights(hf, tmp_path, name):
    (hf / name).write_bytes(b"{}")
    refused(hf, tmp_path, hf, name, "merge it", error=ConfigError)
    with pytest.raises(ConfigError, match=name):
        load_shape(hf)


def test_one_file_and_an_index_of_others(hf, sharded, tmp_path):
    """transformers would take the file, vLLM the index."""
    shutil.copy(hf / "model.safetensors", sharded)
    refused(sharded, tmp_path, sharded, "model.safetensors.index.json", "model-00001", "remove", error=ConfigError)
    names = load_file(hf / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(hf, tmp_path / "out", TO_MEGATRON)


def test_other_safetensors_files_without_an_index(hf, sharded, tmp_path):
    """vLLM would load them all; beside an index neither library does."""
    shutil.copy(hf / "model.safetensors", hf / "consolidated.safetensors")
    refused(hf, tmp_path, hf, "consolidated.safetensors", "vLLM all", error=ConfigError)
    shutil.copy(hf / "model.safetensors", sharded / "consolidated.safetensors")
    convert(sharded, tmp_path / "out", TO_MEGATRON)


def test_a_config_that_names_another_file_of_weights(hf, tmp_path):
    config = json.loads((hf / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (hf / "config.json").write_text(json.dumps(config))
    refused(hf, tmp_path, "transformers_weights", "other.safetensors", error=ConfigError)


def test_remote_code_is_passed_over_as_transformers_does(hf, tmp_path):
    """A folder as DeepSeek publishes it: the classes that auto_map names are not asked for."""
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).state_dict()
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    config = json.loads((hf / "config.json").read_text()) | {"auto_map": auto_map}
    (hf / "config.json").write_text(json.dumps(config))
    for name in ("configuration_x.py", "modeling_x.py"):
        (hf / name).write_text("raise SystemExit('run')")
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, trust_remote_code=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    convert(hf, tmp_path / "megatron", TO_MEGATRON)
    convert(tmp_path / "megatron", tmp_path / "back", ConvertOptions(target="hf", workers=1))
    stored, back = load_file(hf / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert stored.keys() == back.keys() and all(torch.equal(back[name], stored[name]) for name in stored)
