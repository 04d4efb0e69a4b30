"""Which pairs a reward model is trained on, which it is judged by, and in what order. Training itself is in
stages/test_reward_model.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_r1.config.schema import ModelConfig
from megatron_r1.data.preferences import JudgedEncoder, Pair
from megatron_r1.data.tokenizer import character_tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.stages.reward_model.config import PairDataConfig, RewardModelConfig
from megatron_r1.stages.reward_model.run import batch_at, split_pairs

DATA = PairDataConfig(template="plain", max_tokens=40, batch_pairs=4, validation=5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> JudgedEncoder:
    tokenizer = character_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return JudgedEncoder(template="plain", tokenizer=tokenizer, part="answer")


def config(**fields) -> RewardModelConfig:
    model = ModelConfig(path=Path("unused"))
    return RewardModelConfig(name="x", run_dir=Path("x"), model=model, data=dataclasses.replace(DATA, **fields))


def pair(question: str, number: int, *, chosen: str = "", rejected: str = "") -> Pair:
    turns = ({"role": "user", "content": question},)
    return Pair(
        where=f"line {number}", messages=turns, chosen=chosen or f"yes {number}", rejected=rejected or f"no {number}"
    )


def texts(encoder: JudgedEncoder, pairs) -> list[tuple[str, str]]:
    """(chosen, rejected) of encoded pairs, the question in front."""
    return [tuple(encoder.tokenizer.decode(part.token_ids[:-1]) for part in both) for both in pairs]


def test_a_prompt_is_on_one_side_only(encoder):
    pairs = [pair(f"Q{number % 10}", number) for number in range(40)]
    split = split_pairs(config(), encoder, pairs)
    sides = [
        {chosen.split("\n")[0] for chosen, _ in texts(encoder, side)} for side in (split.training, split.validation)
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10
    assert len(split.validation) == 8, "two prompts' pairs: at least as many as are asked for"
    found = texts(encoder, split.training + split.validation)
    assert sorted(found) == sorted((f"Q{n % 10}\nyes {n}", f"Q{n % 10}\nno {n}") for n in range(40))


def test_the_split_is_the_seeds(encoder):
    pairs = [pair(f"Q{number}", number) for number in range(40)]
    first, again = (texts(encoder, split_pairs(config(), encoder, pairs).validation) for _ in "ab")
    other = texts(encoder, split_pairs(config(seed=1), encoder, pairs).validation)
    assert first == again and first != other


def test_pairs_that_cannot_teach_anything_are_counted(encoder):
    """`Q\n` and 38 characters fit into 40 tokens, 39 do not, on either side; thoughts are not judged here."""
    hidden = {"chosen": "<think>a</think>same", "rejected": "<think>b</think>same"}
    odd = [
        pair("Q", 100, chosen="x" * 38),
        pair("Q", 101, chosen="x" * 39),
        pair("Q", 102, rejected="x" * 39),
        pair("Q", 103, **hidden),
    ]
    split = split_pairs(config(), encoder, [pair(f"Q{number}", number) for number in range(20)] + odd)
    assert (split.too_long, split.same) == (2, 1)
    assert len(split.training) + len(split.validation) == 21
    whole = JudgedEncoder(template="plain", tokenizer=encoder.tokenizer, part="response")
    assert split_pairs(config(), whole, [*map(lambda n: pair(f"Q{n}", n), range(20)), odd[-1]]).same == 0


def test_too_few_pairs_are_refused_with_the_reason(encoder):
    with pytest.raises(ConfigError, match=r"data.validation: 5 of 5 pairs with 5 different prompts leaves none"):
        split_pairs(config(), encoder, [pair(f"Q{number}", number) for number in range(5)])
    with pytest.raises(ConfigError, match=r"leaves none to train on"):
        split_pairs(config(), encoder, [pair("Q", number) for number in range(50)])
    with pytest.raises(ConfigError, match=r"of 2 pairs 1 are longer than data.max_tokens = 40, and 1 do not differ"):
        same = pair("Q", 1, chosen="<think>a</think>c", rejected="<think>b</think>c")
        split_pairs(config(), encoder, [pair("Q", 0, chosen="x" * 99), same])


def test_batches_cover_every_pair_once_an_epoch_in_a_new_order(encoder):
    """11 pairs in batches of 4 over 3 epochs: 33 places, nine batches, the last one of one pair."""
    many = config(epochs=3)
    training = split_pairs(many, encoder, [pair(f"Q{number}", number) for number in range(16)]).training
    assert len(training) == 11
    batches = [batch_at(training, step, many) for step in range(9)]
    assert [len(batch) for batch in batches] == [8] * 8 + [2]
    flat = [sequence for batch in batches for sequence in batch]
    drawn = texts(encoder, zip(flat[0::2], flat[1::2], strict=True))
    assert all("yes" in chosen and "no" in rejected for chosen, rejected in drawn)
    assert all(chosen.split("\n")[0] == rejected.split("\n")[0] for chosen, rejected in drawn)
    epochs = [drawn[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(epoch) == sorted(texts(encoder, training)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [len(batch) for batch in map(lambda step: batch_at(training, step, config(epochs=1)), range(3))] == [8, 8, 6]


def test_a_batch_may_hold_more_than_an_epoch(encoder):
    big = config(epochs=4, batch_pairs=30)
    training = split_pairs(big, encoder, [pair(f"Q{number}", number) for number in range(16)]).training
    assert [len(batch_at(training, step, big)) // 2 for step in range(2)] == [30, 14]
