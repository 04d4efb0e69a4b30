"""The tool that compares corrections: its cells' options, what it takes for finished, its curves and its table."""

from __future__ import annotations

import json
from pathlib import Path

import compare_corrections as compare
import pytest

from megatron_r1.__main__ import parse
from megatron_r1.algorithms.correction import Correction
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.faults import validate


def options_of(folder: Path, *words: str):
    return compare.parsed([str(folder), *words])


@pytest.mark.parametrize("method", compare.METHODS)
def test_every_cell_is_a_sound_run_with_its_correction(tmp_path, method):
    options = options_of(tmp_path, "--steps", "32", "--", "--optimizer.lr", "1e-4")
    cell = compare.Cell(method=method, sync_every=4, seed=3)
    base = parse(["tiny"]).model.path
    config = parse(cell.words(base, tmp_path / "run", options))
    assert isinstance(config, GRPOConfig)
    validate(config)
    assert (config.sync_every, config.seed, config.steps, config.optimizer.lr) == (4, 3, 32, 1e-4)
    assert (config.eval_every, config.checkpoint_every, config.rollout.dtype) == (16, 16, "bf16")
    expected = {
        "none": Correction(weight="none"),
        "tis": Correction(weight="token", high=2.0),
        "icepop": Correction(weight="token", beyond="mask", low=0.5, high=5.0),
        "sequence": Correction(weight="sequence", high=2.0),
        "sequence_mask": Correction(weight="sequence", beyond="mask", low=0.5, high=2.0),
        "decoupled": Correction(weight="token", high=1e9),
        "coupled": Correction(ratio_against="rollout"),
    }
    assert config.algorithm.correction == expected[method]  # pyright: ignore[reportAttributeAccessIssue]


def test_syncs_that_have_no_common_evaluations_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options_of(tmp_path, "--sync-every", "3", "4")
    assert "each must divide the longest, 4" in capsys.readouterr().err


def write_cell(cell, base: Path, options, after: float, rewards: list[float]) -> None:
    folder = compare.folder_of(cell, options)
    folder.mkdir(parents=True)
    summary = {"accuracy_before": 0.25, "accuracy_after": after, "seconds_total": 60.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"step": step, "reward_mean": reward, "staleness": step % 2, "kl": 10 * after + step}
        for step, reward in enumerate(rewards)
    ]
    rows[0]["eval_accuracy"] = after - 0.1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.json").write_text(json.dumps(cell.words(base, folder, options)))


def test_results_curves_and_table_of_two_seeds(tmp_path):
    options = options_of(tmp_path, "--methods", "none", "tis", "--sync-every", "1", "2", "--seeds", "0", "1")
    base = tmp_path / "base"
    cells = [compare.Cell(method="tis", sync_every=2, seed=seed) for seed in (0, 1)]
    write_cell(cells[0], base, options, 0.5, [1.0, 2.0])
    write_cell(cells[1], base, options, 0.7, [3.0, 2.0])
    assert all(compare.finished(cell, base, options) for cell in cells)
    assert not compare.finished(cells[0], tmp_path / "other", options), "from another base it is another run"
    assert not compare.finished(compare.Cell(method="none", sync_every=2, seed=0), base, options)
    compare.write(options, cells)
    first, _ = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert (first["method"], first["staleness"], first["accuracy_after"]) == ("tis", 0.5, 0.5)
    assert first["curves"]["reward_mean"] == [[1, 1.0], [2, 2.0]] and first["curves"]["mismatch"] == []
    assert compare.table(options).splitlines() == [
        "| sync every | method | seeds | after 1 steps | at the end | largest KL |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 2 | tis | 2 | 50.0% ± 14.1% | 60.0% ± 14.1% | 7 |",
    ], "KL of the seeds: at most 6 and 8"
    page = (tmp_path / "curves.html").read_text()
    assert "tis (2)" in page and "none (0)" not in page and page.count('class="band') == 2


def test_a_band_is_a_standard_deviation_over_the_seeds_that_have_the_step():
    points, band = compare.spread_of([[[1, 1.0], [2, 5.0]], [[1, 3.0]]])
    assert points == [(1, 2.0), (2, 5.0)]
    assert band == [(1, pytest.approx(2 - 2**0.5), pytest.approx(2 + 2**0.5)), (2, 5.0, 5.0)]
    assert compare.spread_of([[[1, 1.0]]]) == ([(1, 1.0)], [])
