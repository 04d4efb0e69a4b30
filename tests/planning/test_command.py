"""megatron-r1 plan from outside: what it prints, its exit status, and what it says to wrong input."""

import json
import re
from pathlib import Path

import pytest

from megatron_r1.__main__ import main

TINY = Path(__file__).parents[2] / "megatron_r1" / "recipes" / "tiny_v3"


def run(capsys, *words):
    status = main(["plan", *map(str, words)])
    caught = capsys.readouterr()
    return status, caught.out, caught.err


def test_the_671b_recipe_without_its_folder(capsys):
    status, out, err = run(capsys, "grpo_671b", "--gpus", 768, "--gpu", "h100", "--json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["parameters"]["total"] == 671_026_419_200
    assert said["fits"] and said["own"]["gpus"] == 768
    assert said["own"]["seconds"] == pytest.approx(sum(said["own"]["phases"].values()))
    assert said["own"]["parts"][said["own"]["binding"]] == max(said["own"]["parts"].values())
    assert all(plan["memory_bytes"] <= 79.6 * 2**30 for plan in said["found"])
    sync = said["own"]["sync"]
    assert sync["link"] == "network" and sync["receiver_bytes"] == said["own"]["busiest_bytes"] > sync["sender_bytes"]


def test_the_bytes_on_a_syncs_links_are_said(capsys):
    """Qwen2.5-7B on one node of eight: 7.6 billion numbers of two bytes, through the host's memory."""
    status, out, _ = run(capsys, "grpo_qwen_7b_colocated", "--gpu", "h100")
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.startswith("  sync: ")][:1]
    assert re.search(r"\([\d.]+ GB over the host's memory: at most [\d.]+ out of a GPU, [\d.]+ into one, ", line)
    assert re.search(r"some link has [\d.]+ in any plan, [\d.]+ s at its full rate\)", line)
    rows = out[out.index("layouts that fit") :].splitlines()[1:]
    assert re.search(r"sync [\d.]+ for [\d.]+ GB on a link; most: ", rows[0])


def test_too_few_gpus_are_status_1_with_what_would_fit(capsys):
    status, out, err = run(capsys, "grpo_moe_16b", "--gpus", 1, "--gpu", "h100", "--mean-tokens", 512)
    assert (status, err) == (1, "")
    assert "grpo_moe_16b asks for 8 GPUs; --gpus is 1" in out
    assert "nothing that was searched fits 1 h100" in out
    assert "the least that does, " in out and "--parallel.world-size" in out


def test_overrides_are_planned(capsys):
    status, out, _ = run(capsys, "grpo_671b", "--json", "--rollout.tensor-parallel", 16, "--mean-tokens", 1000)
    assert status == 1
    said = json.loads(out)
    assert said["workload"]["mean_response"] == 1000
    (fault,) = [fault for fault in said["faults"] if "tensor_parallel is 16" in fault]
    assert "cannot hold the weights" in fault


def test_any_models_folder_is_planned(capsys):
    status, out, _ = run(capsys, TINY, "--gpus", 8, "--gpu", "a100")
    assert status == 0
    assert out.startswith("tiny_v3: deepseek_v3, 1.02M parameters")
    assert "layouts that fit 8 a100, fastest first" in out


def test_a_supervised_recipe_has_no_servers(capsys):
    status, out, _ = run(capsys, "sft_671b", "--gpus", 512, "--gpu", "h200", "--json")
    assert status in (0, 1)
    own = json.loads(out)["own"]
    assert own["servers"] is None and own["phases"].keys() <= {"train", "logprob"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grpo_671b", "--gpu", "v100"], "--gpu is 'v100'; known are a100, h100"),
        (["grpo_671b", "--gpus", "100"], "--gpus is 100; more than one node must be whole nodes of 8: use 96 or 104"),
        (["grpo_671b", "--gpus", "many"], "--gpus is 'many'; it must be a whole number above 0"),
        (["grpo_671b", "--gpus", "0"], "--gpus is '0'; it must be a whole number above 0"),
        (["grpo_671b", "--gpus"], "--gpus needs a value, e.g. --gpus 512"),
        ([str(TINY)], "--gpus is missing; say how many GPUs there are"),
        (["nope", "--gpus", "8"], "no recipe is called 'nope'"),
        (["r1_671b", "--gpus", "512"], "r1_671b is a pipeline; plan a stage"),
        (["distill_32b", "--gpus", "64"], "model.path: models/Qwen2.5-32B does not exist; it must be a Hugging Face"),
        (["grpo_671b", "--gpus", "768", "--parallel.expert", "3"], "parallel.expert is 3"),
        (["grpo_671b", "--parallel.pipeline-layout", "EtL"], "1 stages; pipeline_parallel * virtual_pipeline is 16"),
        ([], "name a recipe first"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_error_with_the_remedy(capsys, words, message):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_a_folder_without_a_config_is_one_error(capsys, tmp_path):
    status, _, err = run(capsys, tmp_path, "--gpus", 8)
    assert status == 2
    assert f"{tmp_path}/config.json does not exist; it must be a Hugging Face folder" in err
