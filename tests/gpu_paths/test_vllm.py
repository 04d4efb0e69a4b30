"""vLLM's CUDA build takes what we hand it: command lines become the engines meant, weight sources are read."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.engines.vllm.command import NodeSpan, server_command
from megatron_r1.recipes import PACKAGED_SHAPES, RECIPES

pytestmark = [pytest.mark.gpu_paths, pytest.mark.timeout(1200)]
HARMLESS = {
    "nvidia/__init__.py": "without code, in each of NVIDIA's image codecs",
    "build_backend.py": "how two packages are built; nobody imports it",
}
WORKER = Path(__file__).parents[1] / "workers" / "vllm_gpu.py"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def ask(libcuda: Path, *words: str):
    """What the worker answers."""
    library = os.pathsep.join([str(libcuda), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = os.environ | {"LD_LIBRARY_PATH": library, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, str(WORKER), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(answers[-1].removeprefix("ANSWER "))


def folder_of(model: Path, root: Path, **changes: object) -> Path:
    """The published model's sizes in a folder of their own, with changes to config.json."""
    folder = root / f"{model.name}{'-'.join(['', *changes])}"
    folder.mkdir(exist_ok=True)
    fields = json.loads((PACKAGED_SHAPES[model.name] / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def words_of(rollout, folder: Path, **more) -> list[str]:
    """Arguments after `python -m megatron_r1.engines.vllm.launch PID`."""
    return server_command(rollout, model_path=folder, host="127.0.0.1", port=8000, seed=0, **more)[4:]


@pytest.fixture(scope="module")
def engines(libcuda, tmp_path_factory) -> dict[str, dict]:
    """The engine of each command line, by name."""
    root = tmp_path_factory.mktemp("models")
    commands = {}
    for name in ("grpo_qwen_1_5b", "grpo_qwen_7b", "grpo_qwen_7b_colocated", "grpo_moe_16b"):
        config = RECIPES[name]()
        commands[name] = words_of(config.rollout, folder_of(config.model.path, root))
    big = RECIPES["grpo_671b"]()
    folder = folder_of(big.model.path, root)
    span = NodeSpan(nodes=4, node=0, address="127.0.0.1", port=29_600)
    commands["grpo_671b"] = words_of(big.rollout, folder, span=span)
    commands["grpo_671b, node 3"] = words_of(big.rollout, folder, span=dataclasses.replace(span, node=3))
    quantised = dataclasses.replace(
        big.rollout, tensor_parallel=16, num_engines=16, fp8_folder=folder, kv_cache_dtype="fp8"
    )
    commands["grpo_671b in FP8"] = words_of(
        quantised,
        folder_of(big.model.path, root, quantization_config=FP8),
        span=NodeSpan(nodes=2, node=0, address="127.0.0.1", port=29_600),
    )
    drafting = dataclasses.replace(big.rollout, draft_tokens=1)
    commands["grpo_671b, drafting"] = words_of(drafting, folder, span=span)
    commands["reward model"] = words_of(
        RECIPES["grpo_qwen_1_5b"]().rollout,
        folder_of(
            RECIPES["grpo_qwen_1_5b"]().model.path, root, architectures=["Qwen2ForSequenceClassification"], num_labels=1
        ),
        reward_model=True,
    )
    file = root / "commands.json"
    file.write_text(json.dumps(list(commands.values())))
    return dict(zip(commands, ask(libcuda, "commands", str(file)), strict=True))


def test_servers_of_few_gpus(engines):
    small = engines["grpo_qwen_1_5b"]
    assert (small["tensor"], small["backend"], small["sleep"], small["length"]) == (1, "shards", True, 4096)
    assert engines["grpo_qwen_7b"]["backend"] == "shards" and not engines["grpo_qwen_7b"]["sleep"]
    sparse = engines["grpo_moe_16b"]
    assert (sparse["tensor"], sparse["experts"], sparse["length"]) == (4, True, 8192)
    assert all(engine["scale_out"] for name, engine in engines.items() if name != "reward model")


def test_a_server_over_nodes(engines):
    for name in ("grpo_671b", "grpo_671b, node 3"):
        engine = engines[name]
        assert (engine["tensor"], engine["nodes"], engine["experts"], engine["length"]) == (32, 4, True, 33_792)


def test_fp8_drafts_and_reward_models(engines):
    quantised = engines["grpo_671b in FP8"]
    assert (quantised["quantization"], quantised["cache"][:3], quantised["tensor"]) == ("fp8", "fp8", 16)
    assert engines["grpo_671b, drafting"]["draft"] == 1
    judge = engines["reward model"]
    assert (judge["runner"], judge["backend"]) == ("pooling", None)


def test_a_communicator_is_made_as_far_as_the_missing_driver(libcuda):
    """NCCL's library makes the identifier; entering the group fails in it, for want of a device, not before."""
    found = ask(libcuda, "nccl")
    assert found["bytes"] == 128
    kind = found["entering"].split(":")[0]
    assert kind == "RuntimeError" and "NCCL" in found["entering"], found["entering"]


def test_our_engine_is_whole(libcuda):
    assert ask(libcuda, "engine") == {"class": "ShardWeightTransferEngine", "missing": []}


def test_no_file_belongs_to_two_packages():
    """Where two packages hold the same file, which of them stays is chance. Equal files do no harm."""
    import importlib.metadata

    owners: dict[str, dict[str, str]] = {}
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if file.hash is not None and file.suffix in (".py", ".so", ".pyi"):
                owners.setdefault(str(file), {})[package.name] = file.hash.value
    shared = {file: set(found) for file, found in owners.items() if len(set(found.values())) > 1}
    assert {file: found for file, found in shared.items() if file not in HARMLESS} == {}


def test_the_compilers_are_there():
    """The kernels that vLLM compiles when it starts need nvcc, which came as a wheel, and g++."""
    nvcc = Path(sys.prefix) / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc"
    assert nvcc.is_file() and shutil.which("g++")
