"""Conversion: bit-exact there and back, whatever happens on the way, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_checkpoint
from oracles import save_model
from safetensors.torch import load_file, save_file

from megatron_r1.config.shape import load_shape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights import convert as conversion
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.fp8 import FP8
from megatron_r1.weights.torch_dist import MANIFEST
from megatron_r1.weights.verify import compare

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "tools" / "convert_checkpoint.py"
TO_MEGATRON = ConvertOptions(target="torch_dist")
TO_HF = ConvertOptions(target="hf")


def all_tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_tensors(a, b):
    assert list(sorted(a)) == list(sorted(b))
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


def tool(*words, **more):
    command = [sys.executable, str(TOOL), *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


@pytest.fixture
def hf(tmp_path):
    save_model("deepseek_v3", tmp_path / "hf", mtp_layers=1)
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "hf"
    make_checkpoint(folder, num_bytes=1e8, num_shards=3, fp8=True)
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


# ---- interruptions


def test_killed_and_resumed_is_the_same_as_undisturbed(fp8, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_POLL_SECONDS", 0.01)
    undisturbed, target = tmp_path / "undisturbed", tmp_path / "target"
    small = "import megatron_r1.weights.torch_dist_sink as s; s.TASK_BYTES = 8 << 20; "
    slow = "import megatron_r1.weights.convert as c, time; k = c._keep\n"
    slow += "def keep(*a):\n    k(*a); time.sleep(0.05)\nc._keep = keep\n"
    start = "import sys; from pathlib import Path; from megatron_r1.weights.convert import *\n"
    run = "convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(target='torch_dist', resume=len(sys.argv) > 3))"
    subprocess.run([sys.executable, "-c", small + start + run, str(fp8), str(undisturbed)], check=True)
    command = [sys.executable, "-c", small + slow + start + run, str(fp8), str(target)]
    process = subprocess.Popen(command)
    records = tmp_path / "target.partial" / ".records"
    while len(list(records.glob("[0-9]*.json"))) < 4:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    with pytest.raises(FileExistsError, match="--resume"):
        convert(fp8, target, TO_MEGATRON)
    time.sleep(0.5)  # its workers notice
    kept = len(list(records.glob("[0-9]*.json")))
    subprocess.run([*command, "resume"], check=True)
    files = sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(undisturbed) for path in undisturbed.rglob("*") if path.is_file())
    assert all((target / file).read_bytes() == (undisturbed / file).read_bytes() for file in files)
    assert kept >= 4 and not (tmp_path / "target.partial").exists()


def test_resuming_with_another_source_or_precision_is_refused(hf, tmp_path):
    (tmp_path / "out.partial" / ".records").mkdir(parents=True)
    convert_started(hf, tmp_path / "out")
    with pytest.raises(CheckpointError, match="other options"):
        convert(hf, tmp_path / "out", ConvertOptions(target="torch_dist", precision="bf16", resume=True))


def convert_started(source, target):
    """Leave what a conversion leaves that was stopped at once."""
    shape = load_shape(source)
    plan = conversion._plan(source, target.with_name(target.name + ".partial"), shape, TO_MEGATRON)
    with conversion._own(plan.sink.folder, conversion._fingerprint(source, plan, TO_MEGATRON), resume=True):
        pass


def test_two_conversions_to_one_place_are_kept_apart(hf, tmp_path):
    shape = load_shape(hf)
    plan = conversion._plan(hf, tmp_path / "out.partial", shape, TO_MEGATRON)
    with (
        conversion._own(tmp_path / "out.partial", conversion._fingerprint(hf, plan, TO_MEGATRON), resume=False),
        pytest.raises(CheckpointError, match="another conversion"),
    ):
        convert(hf, tmp_path / "out", ConvertOptions(target="torch_dist", resume=True))


def test_a_full_disk_is_named_and_leaves_no_destination(fp8, tmp_path):
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))\n"
    limited += f"import sys; sys.path.insert(0, {str(TOOL.parent)!r})\nimport convert_checkpoint as c\n"
    limited += "sys.exit(c.main(sys.argv[1:]))"
    command = [sys.executable, "-c", limited, "hf-to-megatron", str(fp8), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "out.partial" in done.stderr and "--resume" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    done = tool("hf-to-megatron", fp8, tmp_path / "out", "--resume")
    assert done.returncode == 0, done.stderr
    assert compare(fp8, tmp_path / "out").equal


def test_too_little_space_is_said_before_anything_is_written(hf, tmp_path, monkeypatch):
    usage = conversion.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 are free"):
        convert(hf, tmp_path / "out", TO_MEGATRON)


def test_a_destination_that_exists_is_left_alone(hf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = tool("hf-to-megatron", hf, tmp_path / "out")
    assert done.returncode == 2 and "exists and is not empty" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="inside the source"):
        convert(hf, hf / "out", TO_MEGATRON)
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(hf, tmp_path / "no" / "out", TO_MEGATRON)


def test_workers_die_with_a_killed_conversion(fp8, tmp_path):
    process = subprocess.Popen([sys.executable, str(TOOL), "hf-to-megatron", str(fp8), str(tmp_path / "out")])
    while not (tmp_path / "out.partial").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while (left := running_with(str(tmp_path / "out"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def running_with(word):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if word in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
