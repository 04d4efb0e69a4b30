"""Packing: nothing lost, nothing shifted wrongly, nothing leaked between sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.packing import RowLayout, pack, pack_rank, split_minibatches, unpack, with_advantages
from megatron_r1.errors import DataError
from megatron_r1.types import TrainingSequence


def sequence(tokens, prompt, *, weight=1.0, advantage=0.0, logprobs=None):
    trained = np.arange(len(tokens)) >= prompt
    return TrainingSequence(
        token_ids=np.asarray(tokens, dtype=np.int32),
        loss_mask=trained,
        token_weight=np.where(trained, weight, 0).astype(np.float32),
        advantage=advantage,
        old_logprobs=None if logprobs is None else np.asarray(logprobs, dtype=np.float32),
    )


def test_one_row_by_hand():
    first = sequence([5, 6, 7, 8], prompt=2, weight=0.5, advantage=2.0, logprobs=[0, 0, -1, -2])
    second = sequence([9, 10, 11], prompt=1, weight=0.25, advantage=-1.0, logprobs=[0, -3, -4])
    layout = RowLayout(tokens_per_microbatch=16, row_multiple=4)
    [[row]] = pack([first, second], layout)
    assert row.token_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 0]]
    assert row.labels.tolist() == [[6, 7, 8, 0, 10, 11, 0, 0]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert row.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert row.loss_mask.tolist() == [[False, True, True, False, True, True, False, False]]
    assert row.token_weight.tolist() == [[0, 0.5, 0.5, 0, 0.25, 0.25, 0, 0]]
    assert row.advantages.tolist() == [[0, 2, 2, 0, -1, -1, 0, 0]]
    assert row.old_logprobs.tolist() == [[0, -1, -2, 0, -3, -4, 0, 0]]
    assert row.sequence_indices == (0, 1)
    assert row.token_ids.dtype == row.labels.dtype == row.position_ids.dtype == np.int64
    assert row.cu_seqlens.dtype == np.int32
    assert row.token_weight.dtype == row.advantages.dtype == np.float32


def test_segment_multiple_pads_inside_the_sequence():
    layout = RowLayout(tokens_per_microbatch=16, segment_multiple=4, pad_id=99)
    [[row]] = pack([sequence([1, 2, 3, 4, 5], prompt=1), sequence([6, 7], prompt=1)], layout)
    assert row.token_ids.tolist() == [[1, 2, 3, 4, 5, 99, 99, 99, 6, 7, 99, 99]]
    assert row.cu_seqlens.tolist() == [0, 8, 12]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]
    assert row.loss_mask.tolist() == [[True] * 4 + [False] * 4 + [True] + [False] * 3]


def test_every_rank_has_as_many_rows_and_a_filler_weighs_nothing():
    ranks = pack([sequence([1] * 8, prompt=1)], RowLayout(tokens_per_microbatch=8, row_multiple=2), num_ranks=3)
    assert [len(rows) for rows in ranks] == [1, 1, 1]
    for filler in (ranks[1][0], ranks[2][0]):
        assert filler.num_tokens == 2
        assert filler.cu_seqlens.tolist() == [0, 2]
        assert not filler.loss_mask.any() and filler.token_weight.sum() == 0
        assert filler.sequence_indices == ()


def test_rows_of_a_rank_come_in_multiples():
    layout = RowLayout(tokens_per_microbatch=8, rows_multiple=4)
    ranks = pack([sequence([1] * 8, prompt=1) for _ in range(5)], layout, num_ranks=2)
    assert [len(rows) for rows in ranks] == [4, 4]
    assert sum(row.loss_mask.sum() for rows in ranks for row in rows) == 5 * 7


def test_load_is_spread_over_ranks():
    ranks = pack([sequence([1] * 6, prompt=1) for _ in range(3)], RowLayout(tokens_per_microbatch=12), num_ranks=3)
    assert [rows[0].num_tokens for rows in ranks] == [6, 6, 6]


def test_best_fit_is_kept_where_spreading_does_not_fit():
    lengths = [6, 5, 4, 3, 2]  # 20 tokens in two rows of 10: only 6 + 4 and 5 + 3 + 2 fit
    [rows] = pack([sequence([1] * n, prompt=1) for n in lengths], RowLayout(tokens_per_microbatch=10))
    assert sorted(row.num_tokens for row in rows) == [10, 10]


def test_one_ranks_rows_are_those_of_all():
    sequences = [sequence(range(1, n), prompt=1) for n in (9, 4, 7, 5, 8, 3)]
    layout = RowLayout(tokens_per_microbatch=12)
    for rank, rows in enumerate(pack(sequences, layout, num_ranks=2)):
        own = pack_rank(sequences, layout, rank=rank, num_ranks=2)
        assert [row.token_ids.tolist() for row in own] == [row.token_ids.tolist() for row in rows]


def test_full_rows_have_one_shape():
    layout = RowLayout(tokens_per_microbatch=8, full_rows=True)
    [rows] = pack([sequence([1] * n, prompt=1) for n in (8, 5)], layout)
    assert [row.num_tokens for row in rows] == [8, 8]
    assert rows[1].cu_seqlens.tolist() == [0, 5, 8]


def test_refusals_name_the_sequence():
    layout = RowLayout(tokens_per_microbatch=8, segment_multiple=4)
    with pytest.raises(DataError, match=r"sequence 1: 9 tokens \(12 after padding"):
        pack([sequence([1, 2], prompt=1), sequence([1] * 9, prompt=1)], layout)
    with pytest.raises(DataError, match=r"sequence 0: loss_mask\[0\]"):
        pack([sequence([1, 2], prompt=0)], layout)
    with pytest.raises(DataError, match="sequence 0: old_logprobs has 1 entries for 2"):
        pack([sequence([1, 2], prompt=1, logprobs=[0])], layout)
    with pytest.raises(DataError, match="tokens_per_microbatch: 10"):
        RowLayout(tokens_per_microbatch=10, row_multiple=4)


def test_split_minibatches_is_even_and_ordered():
    assert split_minibatches(list(range(7)), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert split_minibatches([1, 2], 3) == [[], [1], [2]]
    assert split_minibatches([], 2) == [[], []]
    with pytest.raises(ValueError, match="0 minibatches"):
        split_minibatches([1, 2], 0)


def test_other_advantages_stand_where_the_packed_ones_did():
    sequences = [sequence([1, 2, 3, 4], prompt=2, advantage=1.0), sequence([5, 6, 7], prompt=1, advantage=2.0)]
    layout = RowLayout(tokens_per_microbatch=16, segment_multiple=4)
    for rows in pack(sequences, layout, num_ranks=2):
        for row in rows:
            again = with_advantages(row, [1.0, 2.0])
            np.testing.assert_array_equal(again.advantages, row.advantages)
            other = with_advantages(row, [-3.0, 0.5])
            expected = np.where(row.advantages == 1.0, -3.0, np.where(row.advantages == 2.0, 0.5, 0.0))
            np.testing.assert_array_equal(other.advantages, expected)


shapes = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 8)), min_size=0, max_size=12)


@settings(max_examples=150, deadline=None)
@given(shapes, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 6]), st.booleans())
def test_every_trained_token_appears_once_with_its_label_and_weight(shapes, ranks, row_mult, seg_mult, full):
    layout = RowLayout(tokens_per_microbatch=48, row_multiple=row_mult, segment_multiple=seg_mult, full_rows=full)
    # Token value, weight and logprob all encode (sequence, index), so any mix-up shows.
    sequences = []
    for number, (length, prompt) in enumerate(shapes):
        codes = number * 100 + np.arange(length) + 1
        trained = np.arange(length) >= prompt
        sequences.append(
            TrainingSequence(
                token_ids=codes.astype(np.int32),
                loss_mask=trained,
                token_weight=codes.astype(np.float32) + np.float32(0.5),
                advantage=float(number + 1),
                behaviour_logprobs=-codes.astype(np.float32),
            )
        )
    packed = pack(sequences, layout, num_ranks=ranks)
    assert len({len(rows) for rows in packed}) == 1 and len(packed) == ranks
    seen: list[int] = []
    restored = {}
    for rows in packed:
        for row in rows:
            assert row.num_tokens <= 48 and row.num_tokens % layout.multiple == 0
            assert row.cu_seqlens[0] == 0 and row.cu_seqlens[-1] == row.num_tokens
            assert (np.diff(row.cu_seqlens) > 0).all() and (np.diff(row.cu_seqlens) % seg_mult == 0).all()
            segment = np.searchsorted(row.cu_seqlens, np.arange(row.num_tokens), side="right")
            for j in np.flatnonzero(row.loss_mask[0]):
                label = int(row.labels[0, j])
                assert label == row.token_ids[0, j + 1] == row.token_ids[0, j] + 1
                assert segment[j] == segment[j + 1]
                assert row.token_weight[0, j] == label + 0.5
                assert row.behaviour_logprobs[0, j] == -label
                assert row.advantages[0, j] == (label - 1) // 100 + 1
                seen.append(label)
            assert row.token_weight[~row.loss_mask].sum() == 0
        restored.update(unpack(rows, [row.behaviour_logprobs for row in rows], [len(s) for s in sequences]))
    expected = [int(c) for s in sequences for c in s.token_ids[s.loss_mask]]
    assert sorted(seen) == expected
    assert sorted(restored) == list(range(len(sequences)))
    for index, array in restored.items():
        want = np.where(sequences[index].loss_mask, -sequences[index].token_ids, 0)
        assert array.tolist() == want.tolist()


@pytest.mark.parametrize(("tokens", "says"), [([1, 7, 8, 2], "token 8"), ([1, -1, 3], "token -1")])
def test_a_token_outside_the_vocabulary_is_refused(tokens, says):
    """Wherever it came from: a split embedding would look up nothing and train on a logprob of -inf."""
    layout = RowLayout(tokens_per_microbatch=16, vocab_size=8)
    assert pack([sequence([0, 7, 3], prompt=1)], layout)
    with pytest.raises(DataError, match=rf"sequence 1: {says} is not in the model's vocabulary of 8 rows"):
        pack([sequence([0, 7, 3], prompt=1), sequence(tokens, prompt=1)], layout)
