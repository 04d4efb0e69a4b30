"""Conversion: bit-exact there and back, whatever happens on the way, and nothing half-written."""

import json

import pytest
import torch
from make_checkpoint import make_checkpoint
from oracles import save_model
from safetensors.torch import load_file, save_file

from megatron_r1.config.shape import load_shape
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.fp8 import FP8
from megatron_r1.weights.manifest import MANIFEST
from megatron_r1.weights.verify import compare

TO_MEGATRON = ConvertOptions(target="torch_dist")
TO_HF = ConvertOptions(target="hf")


def all_tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_tensors(a, b):
    assert list(sorted(a)) == list(sorted(b))
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


@pytest.fixture
def hf(tmp_path):
    save_model("deepseek_v3", tmp_path / "hf", mtp_layers=1)
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "hf"
    make_checkpoint(folder, num_bytes=3e7, num_shards=3, fp8=True)
    return folder


# ---- there and back


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_plain_q", "llama", "qwen2", "qwen3", "qwen3_moe"])
def test_every_architecture_comes_back_bit_for_bit(name, tmp_path):
    save_model(name, tmp_path / "hf", mtp_layers=1 if name == "deepseek_v3" else 0)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    convert(tmp_path / "hf", tmp_path / "megatron", TO_MEGATRON)
    convert(tmp_path / "megatron", tmp_path / "back", TO_HF)
    same_tensors(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back"))
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    assert load_shape(tmp_path / "back") == load_shape(tmp_path / "hf")
    hashes = [json.loads((tmp_path / kind / MANIFEST).read_text())["tensors"] for kind in ("megatron", "back")]
    assert hashes[0].items() <= hashes[1].items()  # the way back also writes the MTP layer's copies


def test_the_exported_folder_is_what_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    model = save_model("qwen3", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron", TO_MEGATRON)
    convert(tmp_path / "megatron", tmp_path / "back", TO_HF)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.float32
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_fp8_to_bf16_megatron_equals_multiplying_it_out(fp8, tmp_path):
    convert(fp8, tmp_path / "megatron", TO_MEGATRON)
    convert(tmp_path / "megatron", tmp_path / "back", TO_HF)
    stored, back = all_tensors(fp8), all_tensors(tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert set(back) == {name for name in stored if not name.endswith("_scale_inv")}
    for name, tensor in stored.items():
        if tensor.dtype == FP8:
            rows, columns = tensor.shape
            scales = stored[name + "_scale_inv"].double()
            full = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            expected = (tensor.float().double() * full).float().bfloat16()
            assert torch.equal(back[name], expected), name
        elif not name.endswith("_scale_inv"):
            assert torch.equal(back[name], tensor), name


def test_fp8_kept_as_fp8_comes_back_bit_for_bit(fp8, tmp_path):
    keep = ConvertOptions(target="torch_dist", precision="fp8")
    convert(fp8, tmp_path / "megatron", keep)
    convert(tmp_path / "megatron", tmp_path / "back", TO_HF)
    same_tensors(all_tensors(fp8), all_tensors(tmp_path / "back"))
    assert load_shape(tmp_path / "back") == load_shape(fp8)
    assert compare(fp8, tmp_path / "megatron").equal


def test_bf16_to_fp8_export_is_deepseeks_format(fp8, tmp_path):
    convert(fp8, tmp_path / "bf16", ConvertOptions(target="hf", precision="bf16"))
    convert(tmp_path / "bf16", tmp_path / "fp8", ConvertOptions(target="hf", precision="fp8"))
    original, again = all_tensors(fp8), all_tensors(tmp_path / "fp8")
    assert {name: (t.dtype, t.shape) for name, t in original.items()} == {
        name: (t.dtype, t.shape) for name, t in again.items()
    }
    assert (
        json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
        == json.loads((fp8 / "config.json").read_text())["quantization_config"]
    )
    result = compare(tmp_path / "bf16", tmp_path / "fp8", tolerance=2.0**-4)
    assert result.equal, result.differences[:3]


def test_fp32_and_the_router_bias(hf, tmp_path):
    convert(hf, tmp_path / "bf16", ConvertOptions(target="hf", precision="bf16"))
    dtypes = {tensor.dtype for name, tensor in all_tensors(tmp_path / "bf16").items() if "correction_bias" not in name}
    assert dtypes == {torch.bfloat16}
    bias = all_tensors(tmp_path / "bf16")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, all_tensors(hf)["model.layers.1.mlp.gate.e_score_correction_bias"])
    convert(tmp_path / "bf16", tmp_path / "wide", ConvertOptions(target="torch_dist", precision="fp32"))
    assert compare(tmp_path / "bf16", tmp_path / "wide", tolerance=1e-9).equal
    assert not compare(tmp_path / "bf16", tmp_path / "wide").equal


def test_many_files_and_one_worker_give_the_same_tensors(hf, tmp_path):
    convert(hf, tmp_path / "small", ConvertOptions(target="hf", file_bytes=200_000, workers=1))
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 5
    same_tensors(all_tensors(hf), all_tensors(tmp_path / "small"))
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in all_tensors(hf).values())


def test_a_folder_without_mtp_weights_is_converted_without(tmp_path):
    save_model("deepseek_v3", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "megatron", TO_MEGATRON)
    assert compare(tmp_path / "hf", tmp_path / "megatron").equal


def test_a_tied_head_that_is_stored_twice(tmp_path):
    save_model("llama", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, file)
    done = convert(tmp_path / "hf", tmp_path / "megatron", TO_MEGATRON)
    assert done.skipped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    convert(tmp_path / "megatron", tmp_path / "back", TO_HF)
    del tensors["model.layers.0.self_attn.rotary_emb.inv_freq"]
    same_tensors(tensors, all_tensors(tmp_path / "back"))
