"""The page over several runs: what it finds, what it says of broken folders, and what a browser draws of it."""

from __future__ import annotations

import dataclasses
import fcntl
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_r1.__main__ import main
from megatron_r1.algorithms import DAPO
from megatron_r1.config.run_folder import LOCK
from megatron_r1.observe.index import CHARTS, CHOSEN, numbers, report_on
from megatron_r1.observe.metrics import JsonLines, write_json
from megatron_r1.observe.pipeline_report import result_in_words
from megatron_r1.observe.run_list import run_folders, runs_below
from megatron_r1.pipeline.folder import config_as_json, prepare_folder
from megatron_r1.pipeline.kinds import KINDS, kind_of
from megatron_r1.recipes import RECIPES

TINY = RECIPES["r1_tiny"]()


def make_run(folder: Path, config, rows, summary=None) -> None:
    folder.mkdir(parents=True)
    kind = kind_of(config).name
    write_json(folder / "run.json", {"name": config.name, "kind": kind, "config": config_as_json(config)})
    with JsonLines(folder / "metrics.jsonl") as metrics:
        for step, row in enumerate(rows):
            metrics.write({"step": step, **row})
    if summary is not None:
        write_json(folder / "summary.json", summary)


@pytest.fixture
def root(tmp_path) -> Path:
    """Two GRPO runs, a pipeline's SFT and reward model, and folders of every kind of damage."""
    root = tmp_path / "runs"
    grpo = RECIPES["tiny"]()
    rl = [{"reward_mean": 1 + 0.1 * i, "accuracy": 0.1 * i, "loss": 0.5, "tokens_per_second": 900} for i in range(5)]
    make_run(root / "plain", grpo, rl, {"accuracy_before": 0.25, "accuracy_after": 0.5})
    make_run(root / "dapo.1", dataclasses.replace(grpo, algorithm=DAPO()), rl[:2])
    make_run(root / "r1" / "base", TINY.base, [{"loss": 2.0 / (i + 1)} for i in range(3)])
    pairs = [{"pair_loss": 0.7, "pair_accuracy": 0.5, "tokens": 300, "seconds": 1.5}]
    make_run(root / "r1" / "helpful", TINY.helpful, pairs, {"pair_accuracy_before": 0.5, "pair_accuracy_after": 0.75})
    (root / "r1" / "manifest.json").write_text("{}")
    (root / "r1" / "report.html").write_text("")
    (root / "r1" / "base" / "report.html").write_text("")
    (root / "r1" / "base" / "checkpoints").mkdir()
    (root / "r1" / "base" / "checkpoints" / "run.json").write_text("{}")  # a run's own business
    return root


def damage(root: Path) -> dict[str, str]:
    """Folder -> what must be said of it."""
    for name in ("torn", "half", "rows", "list", "<b>&", "null", "binary"):
        (root / name).mkdir()
    (root / "torn" / "run.json").write_text('{"name": "x", "con')
    (root / "half" / LOCK).write_text("1@host")
    (root / "rows" / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    (root / "list" / "metrics.jsonl").write_text("[1]\n")
    (root / "<b>&" / "run.json").write_text("[]")
    (root / "null" / "run.json").write_text('{"config": 3}')
    (root / "binary" / "run.json").write_bytes(b"\xff\xfe\x00")
    return {
        "torn": "not valid JSON", "half": "no run.json", "rows": "line 2: not valid JSON",
        "list": "line 1: not a row with a step", "<b>&": "a JSON list; expected an object", "null": "", "binary": "",
    }  # fmt: skip


def test_runs_are_found_with_what_they_are(root):
    found = {run.name: run for run in runs_below(root)}
    assert found.keys() == {"plain", "dapo.1", "r1/base", "r1/helpful"}
    kinds = {name: (run.stage, run.state, run.fault) for name, run in found.items()}
    assert kinds == {
        "plain": ("GRPO", "done", ""), "dapo.1": ("GRPO, dapo", "stopped", ""),
        "r1/base": ("SFT", "stopped", ""), "r1/helpful": ("reward model", "done", ""),
    }  # fmt: skip
    assert found["plain"].result == "accuracy 25.0% → 50.0%" and len(found["plain"].metrics) == 5


def test_a_run_that_goes_on_says_so(root):
    with open(root / "dapo.1" / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        states = {run.name: run.state for run in runs_below(root)}
    assert states["dapo.1"] == "running" and states["plain"] == "done"


def test_a_kind_is_shown_as_the_run_itself_wrote_it(tmp_path):
    config = dataclasses.replace(TINY.rejection, run_dir=tmp_path / "run", model=tmp_path)
    prepare_folder(config).lock.close()
    assert [run.stage for run in runs_below(tmp_path)] == ["rejection sampling"]


def test_no_two_kinds_have_one_name():
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_broken_folders_are_listed_last_with_the_reason(root):
    reasons = damage(root)
    runs = runs_below(root)
    assert [bool(run.fault) for run in runs] == [False] * 4 + [True] * len(reasons)
    found = {run.name: run.fault for run in runs if run.fault}
    assert found.keys() == reasons.keys() and all(reasons[name] in found[name] for name in reasons)
    page = report_on(root).read_text()
    assert "<b>" not in page and page.count("<tr class=faulty>") == len(reasons)


def test_the_page_holds_the_curves_by_metric(root):
    page = report_on(root).read_text()
    data = json.loads(re.search(r'id="index-data">(.*?)</script>', page)[1])
    place = {name: str(number) for number, name in enumerate(data["runs"])}
    charts = {chart["title"]: chart["series"] for chart in data["charts"]}
    assert charts["Accuracy"][place["plain"]] == [[i, pytest.approx(0.1 * i)] for i in range(5)]
    assert charts["Reward"].keys() == charts["Loss of RL"].keys() == {place["plain"], place["dapo.1"]}
    assert charts["Loss of SFT"] == {place["r1/base"]: [[0, 2.0], [1, 1.0], [2, pytest.approx(2 / 3, rel=1e-5)]]}
    assert charts["Speed"][place["r1/helpful"]] == [[0, 200.0]]
    assert "KL to the reference" not in charts, "nobody has recorded it"
    assert '<a href="r1/base/report.html">r1/base</a>' in page
    assert '<a href="r1/report.html">r1/helpful</a>' in page, "the page of its pipeline"
    assert "reward 1.40, accuracy 40.0%" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", ""), (
        "opens without a network"
    )


def test_values_that_are_no_numbers_are_gaps(root):
    with open(root / "plain" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "accuracy": null, "reward_mean": "x", "loss": 1e999, "kl": NaN}\n{"step": 6, "acc')
    page = report_on(root).read_text()
    data = json.loads(re.search(r'id="index-data">(.*?)</script>', page)[1])
    lengths = {chart["title"]: max(map(len, chart["series"].values())) for chart in data["charts"]}
    assert (lengths["Accuracy"], lengths["Reward"], lengths["Loss of RL"]) == (5, 5, 5)


def test_losses_and_speed_get_names_of_their_own():
    assert numbers({"loss": 1.0})["sft_loss"] == 1.0 and "rl_loss" not in numbers({"loss": 1.0})
    assert numbers({"loss": 1.0, "reward_mean": 0.0})["rl_loss"] == 1.0
    assert "tokens_per_second" not in numbers({"tokens": 3, "seconds": 0}) | numbers({"tokens": 3, "seconds": {}})
    keys = [key for _, _, key, _ in CHARTS]
    assert len(set(keys)) == len(keys)


def test_from_the_command_line(root, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 0 and "report: runs/index.html" in capsys.readouterr().out
    assert main(["report", "runs/plain"]) == 0 and (root / "plain" / "report.html").exists()
    (tmp_path / "empty").mkdir()
    for words, says in (
        (["nowhere"], "nowhere is not a folder"), (["empty"], "there is no run in empty"),
        (["runs", "more"], "report takes one folder"),
    ):  # fmt: skip
        assert main(["report", *words]) == 2 and says in capsys.readouterr().err


def test_links_out_of_the_folder_are_not_followed(root, tmp_path):
    make_run(tmp_path / "elsewhere" / "run", RECIPES["tiny"](), [])
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert len(list(run_folders(root))) == 4


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_draws_what_is_chosen(root, tmp_path):
    """Charts, curves and legend in the page after its script has run."""
    for number in range(CHOSEN):
        make_run(root / f"more{number}", RECIPES["tiny"](), [{"reward_mean": 1.0 * i} for i in range(3)])
        os.utime(root / f"more{number}" / "metrics.jsonl", (1.0, 1.0))  # long ago: not chosen at first, but for some
    damage(root)
    command = ["chromium", "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, report_on(root).as_uri()], capture_output=True, text=True, check=True, timeout=120)
    dom = done.stdout
    titles = [html.unescape(title) for title in re.findall(r"<h3>(.*?)</h3>", dom)]
    # What only runs that are not chosen have recorded has no chart.
    assert titles == ["Reward", "Accuracy", "Loss of RL", "Loss of SFT", "Loss of pairs", "Pairs ranked right", "Speed"]
    (legend,) = re.findall(r'<ul class="legend" id="legend">(.*?)</ul>', dom)
    assert legend.count("<li>") == CHOSEN and "dash-1" in legend, "after six colours come dashes"
    (reward,) = re.findall(r"<h3>Reward</h3>.*?</figure>", dom)
    assert reward.count("<polyline") == 2 + CHOSEN - 4 and "NaN" not in dom and "Infinity" not in reward


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"loss_first": 3.0, "loss_last": 0.0268}, "loss 3.000 → 0.027"),
        (
            {"loss_last": 1.0, "validation_loss_before": 2.0, "validation_loss_after": 0.5},
            "validation loss 2.000 → 0.500",
        ),
        ({"lines": {"base": 3}}, "–"),
    ],
)
def test_a_stages_result_is_a_few_words(summary, words):
    assert result_in_words(summary) == words
