"""The validation split, the files' shares and the stream of examples."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.data.examples import ExampleStore, FileCounts
from megatron_r1.data.mixture import TrainingOrder, examples_per_epoch, split_validation
from megatron_r1.errors import ConfigError


def store(questions_by_file):
    """Examples of one token each; only their questions matter here."""
    sizes = [len(questions) for questions in questions_by_file]
    total = sum(sizes)
    return ExampleStore(
        folder=Path("key"),
        tokens=np.arange(total, dtype=np.int32),
        starts=np.arange(total + 1),
        files=np.repeat(np.arange(len(sizes)), sizes),
        questions=np.array([question for questions in questions_by_file for question in questions], dtype=np.uint64),
        counts=tuple(FileCounts(kept=size, too_long=0, control_text=0) for size in sizes),
    )


def test_no_question_of_validation_is_trained_on():
    both = store([[1, 1, 2, 3, 4], [5, 2, 6, 7, 3]])
    for seed in range(20):
        groups, validation = split_validation(both, 3, seed=seed)
        kept = both.questions[validation].tolist()
        assert len(set(kept)) == 3
        trained = set(both.questions[np.concatenate(groups)].tolist())
        assert trained == {1, 2, 3, 4, 5, 6, 7} - set(kept)
        assert all((both.files[group] == file).all() for file, group in enumerate(groups))
    draws = {tuple(split_validation(both, 3, seed=seed)[1].tolist()) for seed in range(20)}
    assert len(draws) > 5


def test_validation_must_leave_something_of_each_file():
    with pytest.raises(ConfigError, match=r"data\.validation: 3 of 3 different questions"):
        split_validation(store([[1, 2, 3]]), 3, seed=0)
    with pytest.raises(ConfigError, match=r"data\.validation: 9 of 3"):
        split_validation(store([[1, 2, 3]]), 9, seed=0)
    groups, validation = split_validation(store([[1, 2, 3]]), 0, seed=0)
    assert groups[0].tolist() == [0, 1, 2] and len(validation) == 0


def test_shares_of_an_epoch():
    assert examples_per_epoch([10, 30], ()) == [10, 30]
    assert examples_per_epoch([10, 30], (1.0, 1.0)) == [20, 20]
    assert examples_per_epoch([10, 30], (3.0, 1.0)) == [30, 10]
    # 10/3 each: the first remainder gets the last example
    assert examples_per_epoch([4, 3, 3], (1.0, 1.0, 1.0)) == [4, 3, 3]
    assert examples_per_epoch([1, 1, 5], (1.0, 1.0, 1.0)) == [3, 2, 2]
    with pytest.raises(ConfigError, match=r"gives a file none of an epoch's 4 examples"):
        examples_per_epoch([2, 2], (1.0, 0.01))


def order(sizes=(7,), **changes):
    return TrainingOrder(store([range(size) for size in sizes]), SFTDataConfig(**{"batch_sequences": 4} | changes))


def stream(own, start=0):
    parts = []
    while start < own.total:
        parts.append(own.batch(start))
        start += len(parts[-1])
    return parts


def test_batches_reach_over_an_epochs_end_and_only_the_last_is_short():
    own = order(epochs=3)
    batches = stream(own)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 1]
    assert own.num_steps == 6 and own.total == 21
    flat = np.concatenate(batches)
    epochs = [flat[start : start + 7].tolist() for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs == [own.epoch(number).tolist() for number in range(3)]


def test_a_batch_may_be_longer_than_an_epoch():
    own = order(sizes=(3,), epochs=5, batch_sequences=10)
    assert [len(batch) for batch in stream(own)] == [10, 5]
    assert own.num_steps == 2
    assert Counter(np.concatenate(stream(own)).tolist()) == {0: 5, 1: 5, 2: 5}


def test_the_order_is_a_function_of_seed_and_epoch():
    assert order().epoch(1).tolist() == order().epoch(1).tolist()
    assert order().epoch(1).tolist() != order(seed=1).epoch(1).tolist()
    later = order(epochs=3)
    assert [batch.tolist() for batch in stream(later)[3:]] == [batch.tolist() for batch in stream(order(epochs=3), 12)]


def test_weighted_files_are_dealt_evenly():
    # 12 examples an epoch: 9 of the first 4, 3 of the other 8
    own = order(sizes=(4, 8), weights=(3.0, 1.0), epochs=8)
    for number in range(8):
        drawn = own.epoch(number)
        assert (own.epoch_size, np.count_nonzero(drawn < 4)) == (12, 9)
    counts = Counter(np.concatenate(stream(own)).tolist())
    assert {counts[example] for example in range(4)} == {8 * 9 // 4}
    assert {counts[example] for example in range(4, 12)} == {8 * 3 // 8}
    one = Counter(own.epoch(0).tolist())
    assert sorted(one[example] for example in range(4)) == [2, 2, 2, 3]
    assert all(one[example] <= 1 for example in range(4, 12))
