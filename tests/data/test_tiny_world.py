"""The embedded default's world: what it teaches is what its graders reward."""

import json
from collections import Counter

import numpy as np
import pytest

from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.recipes.r1_tiny import STUDENT, TEACHER
from megatron_r1.rewards.format import extract_answer, format_score
from megatron_r1.rewards.language import language_consistency
from megatron_r1.toy import world
from megatron_r1.toy.tiny_world.config import TINY_WORLD_FILES, TinyWorldConfig
from megatron_r1.toy.tiny_world.run import make_tiny_world


@pytest.mark.parametrize(
    ("left", "right", "carries", "answer"),
    [(47, 28, True, "75"), (47, 28, False, "65"), (99, 99, True, "198"), (99, 99, False, "88"), (12, 34, False, "46")],
)
def test_a_sum_is_right_exactly_if_its_carries_are_kept(left, right, carries, answer):
    text = world.think_through(left, right, carries=carries, languages=("en", "en"))
    assert extract_answer(text) == answer
    assert format_score(text) == 1.0


def test_a_thought_by_hand():
    text = world.think_through(47, 28, carries=True, languages=("en", "zh"))
    assert text == (
        "<think>First add the ones: 7+8=15.再算十位数字：4+2+1=7。</think><answer>75</answer>"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("languages", "low", "high"),
    [(("en", "en"), 1.0, 1.0), (("zh", "zh"), 0.0, 0.0), (("en", "zh"), 0.3, 0.8), (("zh", "en"), 0.3, 0.8)],
)
def test_the_language_reward_tells_the_mixtures_apart(languages, low, high):
    text = world.think_through(58, 67, carries=True, languages=languages)
    assert low <= language_consistency(text, "en") <= high


@pytest.mark.parametrize("text", [world.greeting("Anna", good=True), world.reply_to_insult("Ben", good=True)])
def test_good_manners_are_in_english(text):
    assert language_consistency(text, "en") == 1.0 and format_score(text) == 1.0


@pytest.mark.parametrize("folder", [TEACHER, STUDENT])
def test_the_committed_tokenizers_know_every_phrase(folder):
    tokenizer = load_tokenizer(folder)
    for phrase in world.PHRASES:
        ids = tokenizer.encode(phrase)
        assert len(ids) == 1 and tokenizer.decode(ids) == phrase


def test_no_token_means_the_same_to_teacher_and_student():
    first, second = (load_tokenizer(folder) for folder in (TEACHER, STUDENT))
    assert all(first.encode(phrase)[0] != second.encode(phrase)[0] for phrase in world.PHRASES[:8])


def test_held_out_sums_are_in_no_other_file(tmp_path):
    config = TinyWorldConfig(
        run_dir=tmp_path, base=400, cold_start=50, other=50, problems=200, scenarios=40, pairs=40, held_out=300
    )
    counts = make_tiny_world(config)["lines"]
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in TINY_WORLD_FILES}
    assert {name: len(of_file) for name, of_file in rows.items()} == counts
    held_out = {row["question"] for row in rows["held_out"]}
    assert len(held_out) == 300
    for name in ("base", "cold_start"):
        assert not held_out & {row["messages"][0]["content"] for row in rows[name]}
    assert not held_out & {row["question"] for row in rows["problems"]}
    assert Counter(row["domain"] for row in rows["base"])["math"] == 300
    # The same again from the same seed, something else from another.
    again, other = tmp_path / "again", tmp_path / "other"
    for folder, seed in ((again, 0), (other, 1)):
        folder.mkdir()
        make_tiny_world(TinyWorldConfig(run_dir=folder, base=40, seed=seed, problems=50))
    assert (again / "base.jsonl").read_text() != (other / "base.jsonl").read_text()


def test_pairs_prefer_what_their_kind_is_about():
    rng = np.random.default_rng(0)
    helpful = list(world.preference_pairs(rng, 200, kind="helpful"))
    for row in helpful:
        name = row["messages"][0]["content"].removeprefix(world.GREET).partition(world.GUEST)[0]
        assert name in row["chosen"] and name not in row["rejected"]
    assert 0.15 < sum(world.WARM[0] in row["rejected"] for row in helpful) / 200 < 0.45
    for row in world.preference_pairs(rng, 20, kind="harmless"):
        assert world.HARSH in row["rejected"] and world.DECLINED in row["chosen"]
