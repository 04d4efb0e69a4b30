"""The stage from end to end, with a real server whose model is a known Markov chain; and every way that it can stop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from chat_server import chat_server
from transformers import LlamaConfig, LlamaForCausalLM
from written_names import undocumented

from megatron_r1.config.judge import JudgeConfig
from megatron_r1.config.schema import DataConfig, RewardConfig, RolloutConfig, SamplingConfig
from megatron_r1.data.conversations import read_conversations
from megatron_r1.data.tokenizer import character_tokenizer
from megatron_r1.errors import DataError, EmptyStageError, JudgeError
from megatron_r1.rewards.format import extract_answer
from megatron_r1.stages.rejection.config import MixSource, RejectionConfig, validate_rejection
from megatron_r1.stages.rejection.run import run_rejection

CHAIN = {
    "\n": {"<think>": 0.9, "7": 0.1},
    "<think>": {"3": 0.6, "4": 0.3, "z": 0.1},
    "3": {"+": 1.0},
    "4": {"-": 1.0},
    "+": {"</think>": 1.0},
    "-": {"</think>": 1.0},
    "z": {"z": 1.0},  # never ends
    "</think>": {"<answer>": 1.0},
    "<answer>": {"7": 0.6, "8": 0.3, "9": 0.1},
    "7": {"</answer>": 0.9, "<eos>": 0.1},
    "8": {"</answer>": 1.0},
    "9": {"</answer>": 1.0},
    "</answer>": {"<eos>": 1.0},
}
"""What the model says after each token: `3+` or `4-` and one of three answers, or something that is not whole."""

SAMPLES = 24
QUESTIONS = {"seven": "7", "eight": "8", "words": "acht", "leaked": "7", "again": "7", "unlikely": "123"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Hugging Face folder that samples CHAIN: attention and feed-forward add nothing, so that only the last token
    counts; embeddings are one-hot and the head holds log probabilities."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer(folder)
    ids = tokenizer.inner.get_vocab()
    config = LlamaConfig(
        vocab_size=len(ids), hidden_size=128, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False,
        eos_token_id=ids["<eos>"], bos_token_id=None, pad_token_id=ids["<pad>"],
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        llama.model.layers[0].self_attn.o_proj.weight.zero_()
        llama.model.layers[0].mlp.down_proj.weight.zero_()
        llama.model.embed_tokens.weight.copy_(torch.eye(len(ids), 128))
        llama.lm_head.weight.fill_(-30.0)
        for token, following in CHAIN.items():
            for next_token, probability in following.items():
                llama.lm_head.weight[ids[next_token], ids[token]] = math.log(probability)
        llama.lm_head.weight /= math.sqrt(128)  # what the last norm makes of a one-hot vector of 128
    llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict]) -> Path:
        path = folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    rows = [{"id": n, "question": f"The {n} one?", "answer": a, "domain": "sums"} for n, a in QUESTIONS.items()]
    rows[2]["domain"] = "words"
    rows[4]["question"] = "the SEVEN one?"
    talk = [
        {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "ho"}]} for n in "ab"
    ]
    return {
        "problems": write("problems.jsonl", rows),
        "exam": write("exam.jsonl", [{"question": "the leaked one", "answer": "7", "id": "exam-1"}]),
        "other_exam": write("other_exam.jsonl", [{"question": "the unseen one", "answer": "7"}]),
        "talk": write("talk.jsonl", talk),
    }


def config_of(model: Path, files: dict[str, Path], run_dir: Path, **fields) -> RejectionConfig:
    given = {
        "model": model, "run_dir": run_dir, "seed": 5, "samples": SAMPLES, "keep_per_problem": 2,
        "data": DataConfig(files=tuple(files[name] for name in ("problems",) if files), template="plain"),
        "decontaminate": tuple(files[name] for name in ("exam", "other_exam") if files),
        "rewards": RewardConfig(num_workers=1, timeout_seconds=30.0),
        "rollout": RolloutConfig(
            device="cpu", sync="gloo", dtype="fp32", max_model_len=64, memory_fraction=0.3, enforce_eager=True,
            kv_cache_gib=0.1, sampling=SamplingConfig(max_new_tokens=16),
        ),
    }  # fmt: skip
    return RejectionConfig(**(given | fields))


def says_eight_in_german(prompt: str, seed: int) -> str:
    shown = re.search(r"<answer \w+>\n(.*)\n</answer \w+>", prompt)[1]
    return "Verdict: correct" if shown == "8" and "\nacht\n" in prompt else "Verdict: incorrect"


@pytest.fixture(scope="module")
def run(model, files, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("runs") / "rejection"
    with chat_server(says_eight_in_german) as (url, requests):
        judge = JudgeConfig(url=url, model="judge", domains=("words",))
        mix = (MixSource(file=files["talk"], weight=1.0),)
        config = config_of(model, files, folder, judge=judge, mix=mix, weight=2.0)
        validate_rejection(config)
        report = run_rejection(config)
    return {"folder": folder, "config": config, "report": report, "judged": requests}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_problems_that_overlap_repeat_or_are_left_out_are_counted(run, files):
    report = run["report"]
    assert report["problems"] == {"given": 6, "contaminated": 1, "repeated": 1, "no_room": 0, "sampled": 4}
    assert report["contamination"] == {
        str(files["exam"]): {"problems": 1, "evaluation_problems": 1, "examples": {"leaked": "exam-1"}},
        str(files["other_exam"]): {"problems": 0, "evaluation_problems": 0, "examples": {}},
    }


def test_every_sample_is_on_file_with_its_verdict(run):
    samples = lines(run["folder"] / "samples.jsonl")
    assert list(dict.fromkeys(sample["problem"] for sample in samples)) == ["seven", "eight", "words", "unlikely"]
    assert [sample["sample"] for sample in samples] == list(range(SAMPLES)) * 4
    for sample in samples:
        whole = re.fullmatch(r"<think>(3\+|4-)</think><answer>[789]</answer>", sample["text"])
        assert (sample["reason"] in ("truncated", "missing_tags")) == (whole is None), sample
        assert (sample["reason"] == "truncated") == (sample["finish_reason"] == "length")
        if sample["reason"] == "incorrect":
            assert extract_answer(sample["text"]) != QUESTIONS[sample["problem"]]
    assert {"truncated", "missing_tags", "incorrect", "duplicate", "judged_incorrect"} <= {s["reason"] for s in samples}


def test_the_yield_adds_up(run):
    samples, report = lines(run["folder"] / "samples.jsonl"), run["report"]
    assert json.loads((run["folder"] / "yield.json").read_text()) == report
    assert undocumented(run["folder"], "rejection") == set()
    for domain, counts in {None: report["yield"]["all"], **report["yield"]["by_domain"]}.items():
        in_words = {None: (True, False), "words": (True,), "sums": (False,)}[domain]
        reasons = Counter(s["reason"] for s in samples if (s["problem"] == "words") in in_words)
        assert counts["samples"] == reasons.total() == counts["kept"] + sum(counts["dropped"].values())
        assert counts["kept"] == reasons.pop(None) and counts["dropped"] == reasons
    assert report["yield"]["all"]["problems_kept"] == 3


def test_what_is_kept_is_right_different_and_has_its_provenance(run, model):
    kept = [line for line in lines(run["folder"] / "kept.jsonl") if line["source"] == "rejection"]
    assert Counter(line["provenance"]["problem"] for line in kept) == {"seven": 2, "eight": 2, "words": 2}
    texts = {(line["provenance"]["problem"], line["messages"][-1]["content"]) for line in kept}
    assert len(texts) == 6
    samples = {(s["problem"], s["sample"]): s for s in lines(run["folder"] / "samples.jsonl")}
    for line in kept:
        made = line["provenance"]
        assert line["id"] == f"{made['problem']}#{made['sample']}"
        assert samples[made["problem"], made["sample"]]["text"] == line["messages"][-1]["content"]
        assert [turn["role"] for turn in line["messages"]] == ["user", "assistant"]
        assert extract_answer(line["messages"][-1]["content"]) == ("7" if made["problem"] == "seven" else "8")
        assert made["correct_by"] == ("judge" if line["domain"] == "words" else "rule")
        assert made["parts"]["accuracy"] == float(line["domain"] == "sums") and made["parts"]["format"] == 1.0
        assert made["model"] == str(model) and made["temperature"] == 1.0 and made["seed"] == 5
        assert len(made["model_blake3"]) == len(made["config_sha256"]) == len(hashlib.sha256().hexdigest())


def test_only_answers_that_no_rule_knows_were_judged(run):
    samples = lines(run["folder"] / "samples.jsonl")
    asked = [s for s in samples if s["problem"] == "words" and s["reason"] not in ("truncated", "missing_tags")]
    assert len(run["judged"]) == len(asked) == run["report"]["judge"]["asked"] == run["report"]["judge"]["judged"]


def test_other_data_is_mixed_in_and_a_shortage_reported(run, files):
    other = [line for line in lines(run["folder"] / "kept.jsonl") if line["source"] == "talk.jsonl"]
    assert [line["messages"][0]["content"] for line in other] == ["hi a", "hi b"]
    (source,) = run["report"]["mix"]
    assert (source["wanted"], source["written"], source["available"]) == (3, 2, 2)


def test_the_output_is_what_supervised_training_reads(run):
    assert len(list(read_conversations(run["folder"] / "kept.jsonl"))) == 6 + 2
    assert not (run["folder"] / "kept.jsonl.partial").exists()


def test_no_server_is_left(run):
    folder = str(run["config"].model)
    assert [p.pid for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or [])] == []


def test_nothing_kept_stops_with_the_report(model, files, tmp_path):
    """All problems overlap the evaluation set: no server is even started."""
    config = config_of(model, files, tmp_path / "run", decontaminate=(files["problems"],))
    with pytest.raises(EmptyStageError) as caught:
        run_rejection(config)
    assert "no sample was kept" in str(caught.value) and "6 overlap an evaluation problem" in str(caught.value)
    report = json.loads((tmp_path / "run" / "yield.json").read_text())
    assert report["problems"]["contaminated"] == 6 and report["yield"]["all"]["kept"] == 0
    assert report["contamination"][str(files["problems"])]["problems"] == 6
    assert not (tmp_path / "run" / "kept.jsonl").exists()
    assert not (tmp_path / "run" / "logs").exists()


def test_a_judge_that_is_not_there_is_found_before_sampling(model, files, tmp_path):
    config = config_of(model, files, tmp_path / "run", judge=JudgeConfig(url="http://127.0.0.1:9/v1", model="judge"))
    with pytest.raises(JudgeError, match=r"judge.url: http://127.0.0.1:9/v1/models does not answer"):
        run_rejection(config)
    assert not (tmp_path / "run" / "logs").exists()


def test_malformed_other_data_is_found_before_sampling(model, files, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    config = config_of(model, files, tmp_path / "run", mix=(MixSource(file=tmp_path / "bad.jsonl", weight=1.0),))
    with pytest.raises(DataError, match=r"bad.jsonl, line 1"):
        run_rejection(config)
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.slow
def test_instructions_are_graded_as_they_are_in_grpo(model, tmp_path):
    """The model says 7, 8 or 9: what has no comma is right, and kept."""
    row = {"key": 1, "prompt": "Say 7.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (tmp_path / "ifeval.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(files=(tmp_path / "ifeval.jsonl",), template="plain")
    config = config_of(model, {}, tmp_path / "run", data=data, decontaminate=(), samples=12)
    assert run_rejection(config)["yield"]["all"]["kept"] == 2
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert "incorrect" not in {sample["reason"] for sample in samples}


def test_a_preference_problem_is_refused_before_sampling(model, tmp_path):
    (tmp_path / "open.jsonl").write_text('{"question": "Greet Anna.", "grader": "preference", "domain": "general"}\n')
    data = DataConfig(files=(tmp_path / "open.jsonl",), template="plain")
    config = config_of(model, {}, tmp_path / "run", data=data, decontaminate=())
    with pytest.raises(DataError, match=r"open:1: grader 'preference', and no reward model runs in this stage"):
        run_rejection(config)
    assert not (tmp_path / "run" / "logs").exists()


def test_the_same_configuration_has_the_same_hash_only(run, model, files):
    from megatron_r1.stages.rejection.run import _provenance

    config, changed = run["config"], dataclasses.replace(run["config"], samples=3)
    assert _provenance(config, model)["config_sha256"] == run["report"]["provenance"]["config_sha256"]
    assert _provenance(changed, model)["config_sha256"] != run["report"]["provenance"]["config_sha256"]
