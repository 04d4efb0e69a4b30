"""FP8 folders whose scales are powers of two (DeepSeek-V3.1's scale_fmt ue8m0), in float32 or stored as e8m0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_checkpoint
from safetensors.torch import load_file, save_file

from megatron_r1.config.model_folder import power_of_two_scales
from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX
from megatron_r1.weights.verify import compare

TO_FP8 = ConvertOptions(target="hf", precision="fp8", workers=1)
TO_BF16 = ConvertOptions(target="hf", precision="bf16", workers=1)
NAME = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def folder_with(folder: Path, *, stored: torch.dtype) -> Path:
    """V3.1-shaped: scales are powers of two, stored as float32 or as e8m0."""
    make_checkpoint(folder, num_bytes=1, num_shards=1, fp8=True)
    (folder / "model.safetensors.index.json").unlink()
    (file,) = folder.glob("model-*")
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(SCALE_SUFFIX)]:
        exponents = torch.randint(-15, -6, tensors[name].shape, generator=generator)
        tensors[name] = torch.ldexp(torch.ones(exponents.shape), exponents).to(stored)
        codes = tensors[name.removesuffix(SCALE_SUFFIX)].view(torch.uint8)
        codes[::128, ::128] = 0x7E  # 448 in every block, so that quantising again finds the same scales
    file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantisation(folder, scale_fmt="ue8m0")
    return folder


def set_quantisation(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=[torch.float32, torch.float8_e8m0fnu], ids=["float32", "e8m0"])
def published(request, tmp_path_factory) -> Path:
    return folder_with(tmp_path_factory.mktemp("published") / "hf", stored=request.param)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_scales_are_read_as_float64_would(published, tmp_path):
    convert(published, tmp_path / "bf16", TO_BF16)
    tensors, found = stored(published), stored(tmp_path / "bf16")[NAME]
    scales = tensors[NAME + SCALE_SUFFIX].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = (tensors[NAME].float().double() * scales[: found.shape[0], : found.shape[1]]).bfloat16()
    assert torch.equal(found, expected)


def test_bf16_goes_back_to_the_published_scales(published, tmp_path):
    """The bf16 folder remembers the format; codes, scales and quantization_config come back."""
    convert(published, tmp_path / "bf16", TO_BF16)
    assert "quantization_config" not in config_of(tmp_path / "bf16") and power_of_two_scales(tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "megatron", ConvertOptions(target="torch_dist", workers=1))
    convert(tmp_path / "megatron", tmp_path / "fp8", TO_FP8)
    before, after = stored(published), stored(tmp_path / "fp8")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.endswith(SCALE_SUFFIX):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name].float()), name
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor.float(), before[name].float()), name
    assert config_of(tmp_path / "fp8") == config_of(published)


def test_kept_as_fp8_nothing_changes(published, tmp_path):
    convert(published, tmp_path / "megatron", ConvertOptions(target="torch_dist", precision="fp8", workers=1))
    convert(tmp_path / "megatron", tmp_path / "back", ConvertOptions(target="hf", workers=1))
    assert compare(published, tmp_path / "back").equal
    before, after = stored(published), stored(tmp_path / "back")
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert config_of(tmp_path / "back") == config_of(published)


def test_a_format_may_be_chosen(published, tmp_path):
    convert(published, tmp_path / "bf16", TO_BF16)
    other = ConvertOptions(target="hf", precision="fp8", workers=1, scale_format="float32")
    convert(tmp_path / "bf16", tmp_path / "float", other)
    assert "scale_fmt" not in config_of(tmp_path / "float")["quantization_config"]
    with pytest.raises(CheckpointError, match="no scales are made here"):
        convert(published, tmp_path / "other", other)


def test_a_model_that_was_never_fp8(published, tmp_path):
    convert(published, tmp_path / "bf16", TO_BF16)
    config = {key: value for key, value in config_of(tmp_path / "bf16").items() if key != "fp8_scale_fmt"}
    plain = shutil.copytree(tmp_path / "bf16", tmp_path / "plain")
    (plain / "config.json").write_text(json.dumps(config))
    (plain / "megatron_r1_manifest.json").unlink()
    convert(plain, tmp_path / "float", TO_FP8)
    assert "scale_fmt" not in config_of(tmp_path / "float")["quantization_config"]
    asked = ConvertOptions(target="hf", precision="fp8", workers=1, scale_format="ue8m0")
    convert(plain, tmp_path / "asked", asked)
    assert config_of(tmp_path / "asked")["quantization_config"]["scale_fmt"] == "ue8m0"
    scales = stored(tmp_path / "asked")[NAME + SCALE_SUFFIX]
    assert torch.equal(torch.frexp(scales)[0], torch.full(scales.shape, 0.5))
    assert stored(tmp_path / "asked")[NAME].dtype == FP8


def test_a_nan_scale_of_e8m0_is_reported(tmp_path):
    folder = folder_with(tmp_path / "hf", stored=torch.float8_e8m0fnu)
    tensors = stored(folder)
    tensors[NAME + SCALE_SUFFIX].view(torch.uint8)[0, 0] = 0xFF
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{NAME}_scale_inv .1 numbers"):
        convert(folder, tmp_path / "kept", ConvertOptions(target="hf", workers=1))
    with pytest.raises(CheckpointError, match=f"{NAME} .16,384 numbers"):
        convert(folder, tmp_path / "bf16", TO_BF16)


def test_an_unknown_format_is_refused(tmp_path):
    folder = folder_with(tmp_path / "hf", stored=torch.float32)
    set_quantisation(folder, scale_fmt="ue4m3")
    with pytest.raises(ConfigError, match="ue4m3"):
        convert(folder, tmp_path / "bf16", TO_BF16)
