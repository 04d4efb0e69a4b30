"""tools/prepare_checkpoint.py: a published FP8 folder becomes what an RL recipe starts from."""

from __future__ import annotations

import json
from pathlib import Path

import prepare_checkpoint as prepare
import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config import load_shape
from megatron_r1.config.schema import ModelConfig
from megatron_r1.config.trainer_faults import weight_faults
from megatron_r1.engines.quantised import QuantisedSource
from megatron_r1.engines.source import check_parameters, read_shapes
from megatron_r1.weights.convert import convert
from megatron_r1.weights.plan import ConvertOptions

from .make_checkpoint import make_checkpoint


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """As DeepSeek publishes V3-Base, smaller: FP8 in three files, with an MTP layer and its copies, and a tokenizer."""
    folder = tmp_path / "published"
    make_checkpoint(folder, num_bytes=8e6, num_shards=3, fp8=True)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_the_bf16_folder_is_made_and_the_recipe_says_what_it_still_lacks(published, tmp_path, capsys):
    target = tmp_path / "bf16"
    assert prepare.main([str(published), str(target)]) == 0
    said = capsys.readouterr().out
    assert f"model.path: {target} (bf16)   rollout.fp8_folder: {published} (FP8" in said
    assert "grpo_671b still lacks:" in said and "data.files: data/reasoning.jsonl does not exist" in said
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    before, after = tensors(published), tensors(target)
    name = "model.layers.1.self_attn.o_proj.weight"  # 320 x 128: three blocks, the last of 64 rows
    scales = before[f"{name}_scale_inv"]
    assert scales.shape == (3, 1) and after[name].dtype == torch.bfloat16
    by_row = scales.repeat_interleave(128, 0)[:320].double()
    assert torch.equal(after[name], (before[name].double() * by_row).float().bfloat16())
    shape = load_shape(target)
    assert weight_faults(ModelConfig(path=target), shape) == []
    (fault,) = weight_faults(ModelConfig(path=published), load_shape(published))
    assert f"tools/prepare_checkpoint.py {published} TARGET" in fault and "rollout.fp8_folder" in fault

    # Once more: nothing is written again.
    changed = (target / "config.json").stat().st_mtime_ns
    assert prepare.main([str(published), str(target)]) == 0
    assert "equal" in capsys.readouterr().out and (target / "config.json").stat().st_mtime_ns == changed


def test_the_published_folder_takes_the_weights_of_the_bf16_one(published, tmp_path):
    """Servers that start from it take all that a sync of the bf16 model sends, by name, shape and scale."""
    target = tmp_path / "bf16"
    assert prepare.main([str(published), str(target)]) == 0
    served = read_shapes(published)

    class Source:
        def metadata(self):
            return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors(target).items()]

        def __iter__(self):
            return iter(tensors(target).items())

    sent = QuantisedSource(Source(), served, block=128).metadata()
    check_parameters([(name, dtype, tuple(shape)) for name, dtype, shape in sent], served)
    assert {name for name, _, _ in sent} == set(served)


def test_what_an_interrupted_run_has_done_is_kept(published, tmp_path, capsys):
    target = tmp_path / "bf16"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(published, target, ConvertOptions(target="hf", precision="bf16", workers=1), progress=stop)
    assert (tmp_path / "bf16.partial").exists() and not target.exists()
    assert prepare.main([str(published), str(target)]) == 0
    assert target.exists() and not (tmp_path / "bf16.partial").exists()


def lacks_a_file(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def is_cut_short(folder: Path) -> None:
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lacks_its_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def is_bf16(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lacks_a_file, "names model-00002-of-00003.safetensors, which does not exist; fetch the missing file"),
        (is_cut_short, "100 bytes are missing; fetch it again"),
        (lacks_its_tokenizer, "holds no tokenizer.json"),
        (is_bf16, "is not FP8; nothing is to be prepared: give it as model.path"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_anything_is_written(published, tmp_path, capsys, spoil, says):
    spoil(published)
    assert prepare.main([str(published), str(tmp_path / "bf16")]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("bf16*"))


def test_another_models_folder_is_not_taken_for_the_result(published, tmp_path, capsys):
    other = tmp_path / "other"
    make_checkpoint(other, num_bytes=3e7, num_shards=1, fp8=False)
    assert prepare.main([str(published), str(other)]) == 2
    assert "is not the model of" in capsys.readouterr().err
    assert prepare.main([str(tmp_path / "absent"), str(tmp_path / "bf16")]) == 2
    assert "does not exist; fetch the published model" in capsys.readouterr().err
    assert prepare.main([str(published), str(tmp_path / "bf16"), "--recipe", "sft_671b"]) == 2
    assert "--recipe is sft_671b; it must be an RL recipe" in capsys.readouterr().err
