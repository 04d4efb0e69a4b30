"""tools/simulate_cluster.py: the ways of running the loop against each other, its picture, and what it refuses."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import simulate_cluster as cluster

from megatron_r1.config import load_shape
from megatron_r1.errors import UserError
from megatron_r1.planning.hardware import GPUS
from megatron_r1.recipes import RECIPES

CONFIG = RECIPES["tiny"]()


@pytest.fixture(scope="module")
def walked():
    ways, slots, plan = cluster.walk(CONFIG, load_shape(CONFIG.model.path), GPUS["h100"], steps=3)
    return {way.name: way for way in ways}, slots, plan


def test_phases_add_up_or_overlap(walked):
    ways = walked[0]
    for way in ways.values():
        together = max(way.rollout, way.trainer) if way.overlapped else way.rollout + way.trainer
        assert way.step == pytest.approx(together + way.sync)
    synchronous, ahead = ways["synchronous"], ways["async, one step ahead"]
    saved = min(synchronous.rollout, synchronous.trainer)
    assert synchronous.step - ahead.step == pytest.approx(saved)
    assert (synchronous.stale, ahead.stale) == (0.0, 1.0)


def test_partial_rollouts_waste_nothing_and_oversampling_is_not_stale(walked):
    ways = walked[0]
    partial, oversampled = ways["partial rollouts"], ways["oversampled"]
    assert partial.wasted == 0.0 and 0.0 < partial.stale < 0.5
    assert oversampled.stale == 0.0 and 0.0 < oversampled.wasted < 0.5
    for way in (partial, oversampled):
        assert way.rollout < ways["synchronous"].rollout
    finished = [span for span in oversampled.first.spans if span.finished]
    assert len(finished) >= CONFIG.prompts_per_step * CONFIG.group_size


def test_the_walk_and_the_planners_closed_form_agree(walked):
    ways, _, plan = walked
    assert ways["synchronous"].step == pytest.approx(plan.seconds, rel=0.25)


def test_the_report_names_every_way_and_the_picture_is_one_svg(walked):
    ways, slots, plan = walked
    said = cluster.text(list(ways.values()), slots, plan)
    picture = cluster.draw(list(ways.values()), slots, title="a <title> & more")
    root = ElementTree.fromstring(picture)
    words = "".join(root.itertext())
    assert "a <title> & more" in words
    for name in ways:
        assert name in said and name in words
    bars = [node for node in root.iter() if node.tag.endswith("rect")]
    assert len(bars) >= len(slots) + 3 * len(ways)
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")


def test_a_layout_that_does_not_fit_is_refused():
    config = cluster_config(["grpo_671b", "--rollout.tensor-parallel", "8"])
    shape = load_shape(Path(__file__).parent / "deepseek_v3.json")
    with pytest.raises(UserError, match="megatron-r1 plan says what would fit"):
        cluster.walk(config, shape, GPUS["h100"], steps=1)


def cluster_config(words):
    from megatron_r1.__main__ import parse

    return parse(words)


def test_only_a_recipe_with_rollouts_is_walked():
    with pytest.raises(UserError, match="sft_671b has no rollouts"):
        cluster.main(["sft_671b"])


def test_a_run_that_logged_too_little_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"config": {"rollout": {"max_num_seqs": 8}}}))
    (run / "rollouts.jsonl").write_text(json.dumps({"step": 0, "tokens": 5}) + "\n")
    row = {"step": 0, "tokens": 30, "completion_tokens": 10, "seconds": {"rollout": 1.25}}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="logged 1 completions a step"):
        cluster.record(tmp_path / "out.json", [run])
    (run / "metrics.jsonl").write_text(json.dumps(row | {"completion_tokens": 5}) + "\n")
    assert cluster.record(tmp_path / "out.json", [run]) == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert found == {"seats": 8, "step": 0, "prompt_tokens": 25, "seconds": 1.25, "lengths": [5]}
