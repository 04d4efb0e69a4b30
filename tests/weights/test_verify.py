"""verify finds every kind of difference and says equal only of equal folders."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from oracles import save_model
from safetensors.torch import load_file, save_file

from megatron_r1.errors import CheckpointError
from megatron_r1.weights import verify
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.verify import compare

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_model("qwen2", folder)
    return folder


@pytest.fixture
def pair(model, tmp_path):
    shutil.copytree(model, tmp_path / "a")
    shutil.copytree(model, tmp_path / "b")
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


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope is "),
        ({"rms_norm_eps": 1e-2}, "norm_eps is 1e-06 and 0.01"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, "num_heads is 4 and 8"),
    ],
)
def test_the_same_weights_with_another_config_are_another_model(pair, fields, words):
    change_config(pair[1], **fields)
    found = compare(*pair).differences
    assert {difference.name for difference in found} == {"config.json"}
    assert any(words in difference.what for difference in found)


def test_two_folders_without_tensors_are_no_models(pair):
    for folder in pair:
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"that config\.json implies are missing"):
        compare(*pair)


@pytest.mark.parametrize("change", [lambda t: t[5:].mul_(-100), lambda t: t[5:].fill_(torch.nan)])
def test_an_infinity_in_both_excuses_nothing(pair, change):
    for folder in pair:
        edit(folder, lambda tensors: tensors["model.embed_tokens.weight"][0, 0].fill_(torch.inf))
    assert compare(*pair, tolerance=0.01).equal
    edit(pair[1], lambda tensors: change(tensors["model.embed_tokens.weight"]))
    assert [difference.name for difference in compare(*pair, tolerance=0.01).differences] == [
        "model.embed_tokens.weight"
    ]


def test_what_a_conversion_leaves_out_is_no_difference(pair, tmp_path):
    edit(pair[0], lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    convert(pair[0], tmp_path / "megatron", ConvertOptions(target="torch_dist", workers=1))
    assert compare(pair[0], tmp_path / "megatron").equal
    assert compare(*pair).equal


@pytest.mark.parametrize("shape", [[2**50, 0], [3, 0]])
def test_tensors_without_bytes_are_passed_over(pair, shape):
    """They are no model's, which is said only after the numbers: what differs is of more use."""
    for folder, dtype in zip(pair, ("F32", "BF16"), strict=True):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        end = len(data) - 8 - length
        header["empty"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end]}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    change_config(pair[1], rms_norm_eps=1.0)
    found = compare(*pair, tolerance=0.1)
    assert [difference.name for difference in found.differences] == ["config.json"]


@pytest.mark.parametrize("workers", [0, -3])
def test_the_number_of_workers(pair, workers):
    with pytest.raises(CheckpointError, match="workers is"):
        compare(*pair, workers=workers)
    assert compare(*pair, workers=100).equal


def main(capsys, *words):
    """(exit status, standard output, standard error) of the tool in this process."""
    status = convert_checkpoint.main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_the_tools_exit_status(pair, tmp_path, capsys):
    convert(pair[0], tmp_path / "megatron", ConvertOptions(target="torch_dist", workers=1))
    status, out, _ = main(capsys, "verify", pair[0], tmp_path / "megatron", "--logits")
    assert status == 0 and "equal: 27 tensors" in out and "likeliest token the same at 24" in out
    (pair[0] / "tokenizer.json").write_text("{}")
    status, out, err = main(capsys, "verify", pair[0], tmp_path / "megatron", "--logits")
    assert status == 2 and "tokenizer.json: cannot be read as a tokenizer" in err
    edit(pair[1], lambda tensors: tensors[NAME].add_(0.01))
    status, out, _ = main(capsys, "verify", pair[1], tmp_path / "megatron")
    assert status == 1 and f"{NAME}: 8,192 of 8,192 numbers differ, by up to 0.01" in out
    status, out, _ = main(capsys, "inspect", tmp_path / "megatron")
    config = json.loads((pair[0] / "config.json").read_text())
    assert status == 0 and "torch_dist checkpoint, qwen2" in out and f"{config['num_hidden_layers']} layers" in out


def test_a_fault_of_the_tool_is_not_a_difference(pair, capsys, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda self: 1 / 0)
    status, _, err = main(capsys, "verify", *pair)
    assert status == 2 and "ZeroDivisionError" in err and "fault of the tool" in err


def test_names_are_escaped_on_the_terminal(pair, capsys):
    edit(pair[0], lambda tensors: tensors.update({"\x1b[2J": torch.ones(1)}))
    status, out, _ = main(capsys, "verify", *pair)
    assert status == 1 and "\\x1b[2J: only in" in out and "\x1b" not in out


@pytest.mark.parametrize(
    "words", [("--workers", "0"), ("--workers", "x"), ("--tolerance", "nan"), ("--tolerance", "-1")]
)
def test_odd_options_are_refused(pair, capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(capsys, "verify", *pair, *words)
    assert caught.value.code == 2


def stopped(pair, output, function):
    """Compare in a forked process whose workers run `function` instead. (exit status, output)."""

    def run():
        os.setsid()
        handle = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        verify._compare_group = function
        status = convert_checkpoint.main(["verify", *map(str, pair)])
        sys.stderr.flush()
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(30)
    return process.exitcode, output.read_text()


def interrupt_all(names):
    os.killpg(0, signal.SIGINT)
    time.sleep(0.5)
    return [], 0


def die(names):
    os.kill(os.getpid(), signal.SIGKILL)


def test_interrupted_and_killed(pair, tmp_path):
    status, output = stopped(pair, tmp_path / "output", interrupt_all)
    assert status == 2 and output == "stopped; begin again when you like: nothing was written\n"
    status, output = stopped(pair, tmp_path / "output-2", die)
    assert status == 2 and output == (
        "a worker process was killed (is memory short?); try again with fewer --workers\n"
    )
