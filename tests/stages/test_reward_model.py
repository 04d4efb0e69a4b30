"""The Bradley-Terry loss by hand and by autograd; one step on pairs, in every layout, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from grpo_oracle import hf_gradients
from oracles import VOCAB, make_model, random_sequences
from ranks import Results, run_launches
from written_names import undocumented

from megatron_r1.config.schema import ModelConfig
from megatron_r1.data.preferences import JudgedEncoder, read_pairs
from megatron_r1.data.tokenizer import character_tokenizer, load_tokenizer
from megatron_r1.stages.reward_model.config import PairDataConfig, RewardModelConfig
from megatron_r1.stages.reward_model.loss import bradley_terry, ranked_right
from megatron_r1.stages.reward_model.run import split_pairs
from megatron_r1.toy.world import PHRASES, preference_pairs

# ---- pure functions


def test_bradley_terry_by_hand():
    """Differences 0 and log 3: -log 1/2 and -log 3/4."""
    loss, gradient = bradley_terry(np.array([1.0, np.log(3)]), np.array([1.0, 0.0]))
    assert loss == pytest.approx((np.log(2) + np.log(4 / 3)) / 2, rel=1e-14)
    np.testing.assert_allclose(gradient, [-1 / 4, -1 / 8], rtol=1e-14)


def test_bradley_terry_is_autograds_in_float64():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 8, 50), rng.normal(0, 8, 50)
    first, second = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (chosen, rejected))
    expected = -torch.nn.functional.logsigmoid(first - second).mean()
    expected.backward()
    loss, gradient = bradley_terry(chosen, rejected)
    assert first.grad is not None and second.grad is not None
    assert loss == pytest.approx(float(expected), rel=1e-14)
    np.testing.assert_allclose(gradient, first.grad.numpy(), rtol=1e-12)
    np.testing.assert_allclose(-gradient, second.grad.numpy(), rtol=1e-12)


def test_bradley_terry_does_not_overflow():
    with np.errstate(over="raise", invalid="raise"):
        loss, gradient = bradley_terry(np.array([1e4, -1e4]), np.array([-1e4, 1e4]))
    assert loss == 1e4 and gradient.tolist() == [0.0, -0.5], "the mean of 0 and 20,000"
    assert bradley_terry(np.float32([800]), np.float32([0]))[0] == 0.0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_value_that_is_not_finite_is_not_hidden():
    loss, gradient = bradley_terry(np.array([np.nan, 1.0]), np.array([0.0, 0.0]))
    assert np.isnan(loss) and np.isnan(gradient[0]) and np.isfinite(gradient[1])


def test_a_tie_counts_half():
    assert ranked_right(np.array([2.0, 1.0, 1.0, 1.0, 0.0, 1.0, 3.0, 0.0])) == pytest.approx(2.5 / 4)
    assert ranked_right(np.zeros(6)) == 0.5


# ---- the step, against transformers

LAYOUTS = {
    1: ["deepseek_v3-one"],
    2: [
        *("deepseek_v3-tp2", "deepseek_v3-ep2", "deepseek_v3-pp2", "deepseek_v3-cp2"),
        *("qwen2-tp2nosp", "qwen2-pp2", "stage"),
    ],
}
NAMES = [name for names in LAYOUTS.values() for name in names if name != "stage"]
PAIR_LENGTHS = [(60, 11), (31, 52), (9, 44), (20, 21), (75, 5)]
"""Of chosen and rejected."""
STAGE = {"template": "plain", "part": "response", "max_tokens": 90, "batch_pairs": 16, "epochs": 1, "validation": 24}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """What every layout found; "folder" is where it lies, "oracle" holds transformers' values, gradients, loss."""
    folder = tmp_path_factory.mktemp("reward_models")
    oracle = {name: save_classifier(name, folder / name) for name in ("deepseek_v3", "qwen2")}
    prepare_stage(folder)
    launches = {ranks: [str(folder), ",".join(names)] for ranks, names in LAYOUTS.items()}
    failures = run_launches("reward_model.py", launches, timeout_seconds=500)
    results = Results(folder, LAYOUTS, failures)
    results |= {"oracle": oracle, "folder": {"path": folder}}
    return results


def save_classifier(name: str, folder: Path) -> dict:
    """A classifier with one label around the oracles' model `name`, saved with pairs; its values, and the real loss'
    gradients by autograd. Qwen2's config says that embedding and head are tied."""
    from transformers import AutoModelForSequenceClassification

    base = make_model(name)
    fields = {"num_labels": 1} | ({"tie_word_embeddings": True} if name == "qwen2" else {})
    model = AutoModelForSequenceClassification.from_config(type(base.config)(**(base.config.to_dict() | fields)))
    model = model.float().eval()
    missing = model.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert missing == ["score.weight"]
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    if name == "deepseek_v3":
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0}
        (folder / "config.json").write_text(json.dumps(config))
    sequences = random_sequences([length for pair in PAIR_LENGTHS for length in pair])
    np.savez(folder / "pairs.npz", **{str(i): ids for i, ids in enumerate(sequences)})
    values = torch.stack([model(torch.tensor(ids.astype(np.int64))[None]).logits[0, 0] for ids in sequences])
    loss = -torch.nn.functional.logsigmoid(values[0::2] - values[1::2]).mean()
    loss.backward()
    gradients = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
    return {"values": values.detach().numpy(), "loss": loss.item(), "gradients": gradients}


def test_no_rank_fails(results):
    assert not results.failures


@pytest.mark.parametrize("name", NAMES)
def test_values_equal_transformers(results, name):
    expected = results["oracle"][name.partition("-")[0]]["values"]
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(results[name]["values"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_autograd_of_the_bradley_terry_loss(results, name):
    """Relative to each tensor's largest gradient; every parameter has one, the replicated head too."""
    oracle = results["oracle"][name.partition("-")[0]]
    expected = hf_gradients(oracle["gradients"])
    found = {key.split(":")[1]: value for key, value in results[name].items() if key.startswith("gradient:")}
    assert set(expected) == set(found) and "score.weight" in found
    for key, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[key] / scale, gradient / scale, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_reports_the_loss_before_it_and_its_whole_gradients_norm(results, name):
    """The norm counts the replicated head once: transformers' has it once."""
    oracle, found = results["oracle"][name.partition("-")[0]], results[name]
    values = oracle["values"]
    assert found["loss"] == pytest.approx(oracle["loss"], rel=1e-5)
    assert found["margin"] == pytest.approx(float((values[0::2] - values[1::2]).mean()), abs=1e-5)
    assert found["accuracy"] == ranked_right(values)
    norm = np.sqrt(sum(np.square(value.astype(np.float64)).sum() for value in oracle["gradients"].values()))
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert bradley_terry(found["after"][0::2], found["after"][1::2])[0] < found["loss"]


def test_pairs_are_torn_over_rows_and_ranks(results):
    """Else the layouts above would prove less than they say."""
    for name, which in (("deepseek_v3-one", 1), ("deepseek_v3-ep2", 0)):
        places = results[name]["places"]
        assert (places[0::2, which] != places[1::2, which]).any(), name


# ---- the stage, from pairs to a folder


def prepare_stage(folder: Path) -> None:
    """A random Qwen2 with a tokenizer and tied embeddings, and 200 pairs of the tiny world, one of them too long."""
    from transformers import AutoModelForCausalLM

    tokenizer = character_tokenizer(folder / "base", phrases=PHRASES)
    template = make_model("qwen2").config
    fields = template.to_dict() | {"vocab_size": VOCAB + 64, "tie_word_embeddings": True}
    assert tokenizer.vocab_size <= fields["vocab_size"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(type(template)(**fields)).save_pretrained(folder / "base")
    rows = list(preference_pairs(np.random.default_rng(0), 200, kind="harmless"))
    rows[7]["chosen"] = rows[7]["chosen"].replace("</answer>", "!" * 200 + "</answer>")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "stage.json").write_text(json.dumps(STAGE))


@pytest.fixture(scope="module")
def stage(results) -> dict:
    """The finished stage's summary and folder, and the values of its validation pairs by transformers."""
    from transformers import AutoModelForSequenceClassification

    assert results["stage"]["steps"] > 0
    folder = results["folder"]["path"]
    data = PairDataConfig(files=(folder / "pairs.jsonl",), **STAGE)
    config = RewardModelConfig(name="x", run_dir=folder / "run", model=ModelConfig(path=folder / "base"), data=data)
    encoder = JudgedEncoder(template=data.template, tokenizer=load_tokenizer(folder / "run" / "model"), part=data.part)
    validation = split_pairs(config, encoder, read_pairs(data.files)).validation
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run" / "model", dtype=torch.float32)
    with torch.no_grad():
        values = [
            # The last token stands for the value's place and is not the model's to see.
            model(torch.tensor(sequence.token_ids[:-1].astype(np.int64))[None]).logits[0, 0].item()
            for pair in validation
            for sequence in pair
        ]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return {"summary": summary, "model": folder / "run" / "model", "values": np.array(values), "run": folder / "run"}


def test_the_exported_folder_gives_the_trainers_values_in_transformers(stage):
    summary, values = stage["summary"], stage["values"]
    assert summary["value_mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert summary["value_std"] == pytest.approx(values.std(), rel=1e-5)
    assert summary["pair_accuracy_after"] == ranked_right(values)


def test_the_stage_learns_to_rank_and_says_how_well(stage):
    summary = stage["summary"]
    assert summary["pair_accuracy_before"] == 0.5, "the head starts at 0: every pair is a tie"
    assert summary["pair_accuracy_after"] == 1.0, "of names that it was not trained on"
    assert (summary["too_long"], summary["same"]) == (1, 0)
    rows = [json.loads(line) for line in (stage["run"] / "metrics.jsonl").read_text().splitlines()]
    assert undocumented(stage["run"], "reward_model") == set()
    assert len(rows) == summary["steps"] == -(-summary["pairs"] * STAGE["epochs"] // STAGE["batch_pairs"])
    assert rows[0]["pair_loss"] == pytest.approx(np.log(2)) and rows[-1]["pair_loss"] < 0.1


def test_the_folder_says_what_it_judges(stage):
    told = json.loads((stage["model"] / "megatron_r1.json").read_text())
    assert (told["stage"], told["part"], told["template"]) == ("harmless", "response", "plain")
    assert told["step"] == stage["summary"]["steps"]
    assert (told["value_mean"], told["value_std"]) == (stage["summary"]["value_mean"], stage["summary"]["value_std"])
    config = json.loads((stage["model"] / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"] and config["num_labels"] == 1
