"""verify finds every kind of difference and says equal only of equal folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import save_model
from safetensors.torch import load_file, save_file

from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.verify import compare

TOOL = Path(__file__).parent.parent.parent / "tools" / "convert_checkpoint.py"
NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def pair(tmp_path):
    save_model("qwen2", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def edit(folder, function):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    function(tensors)
    save_file(tensors, file)


def test_equal_folders(pair):
    result = compare(*pair)
    assert result.equal and result.compared == len(load_file(pair[0] / "model.safetensors"))


@pytest.mark.parametrize("value,worst", [(0.5, 0.5), (float("nan"), float("inf"))])
def test_one_number(pair, value, worst):
    def change(tensors):
        tensors[NAME][3, 4] += value

    edit(pair[1], change)
    (difference,) = compare(*pair).differences
    assert difference.name == NAME and "1 of 8,192 numbers" in difference.what
    assert difference.worst == pytest.approx(worst, abs=1e-6)


def test_the_sign_of_zero_is_a_difference(pair):
    for folder, zero in zip(pair, (0.0, -0.0), strict=True):
        edit(folder, lambda tensors, zero=zero: tensors[NAME][0, 0].fill_(zero))
    assert [difference.worst for difference in compare(*pair).differences] == [0.0]


def test_the_same_nan_is_equal(pair):
    for folder in pair:
        edit(folder, lambda tensors: tensors[NAME][0, 0].fill_(torch.nan))
    assert compare(*pair).equal


def test_names_shapes_and_dtypes(pair):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["more"] = torch.ones(2)
        tensors[NAME] = tensors[NAME][:, :5].clone()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()

    edit(pair[1], change)
    found = {difference.name: difference.what for difference in compare(*pair, data=False).differences}
    assert set(found) == {"model.norm.weight", "more", NAME, "lm_head.weight"}
    assert "only in" in found["model.norm.weight"] and str(pair[0]) in found["model.norm.weight"]
    assert str(pair[1]) in found["more"]
    assert "[64, 128] and [64, 5]" in found[NAME] and "bfloat16" in found["lm_head.weight"]


def test_a_tolerance_is_relative_to_the_largest(pair):
    edit(pair[1], lambda tensors: tensors.update({name: t * (1 + 1e-4) for name, t in tensors.items()}))
    assert compare(*pair, tolerance=2e-4).equal
    assert not compare(*pair, tolerance=5e-5).equal


def test_the_tools_exit_status(pair, tmp_path):
    def run(*words):
        command = [sys.executable, str(TOOL), *(str(word) for word in words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)

    convert(pair[0], tmp_path / "megatron", ConvertOptions(target="torch_dist", workers=1))
    done = run("verify", pair[0], tmp_path / "megatron", "--logits")
    assert done.returncode == 0 and "equal: 27 tensors" in done.stdout, done.stdout + done.stderr
    assert "likeliest token the same at 24" in done.stdout
    edit(pair[1], lambda tensors: tensors[NAME].add_(0.01))
    done = run("verify", pair[1], tmp_path / "megatron")
    assert done.returncode == 1 and f"{NAME}: 8,192 of 8,192 numbers differ, by up to 0.01" in done.stdout, done.stdout
    done = run("inspect", tmp_path / "megatron")
    assert done.returncode == 0 and "torch_dist checkpoint, qwen2" in done.stdout
    config = json.loads((pair[0] / "config.json").read_text())
    assert f"{config['num_hidden_layers']} layers" in done.stdout
