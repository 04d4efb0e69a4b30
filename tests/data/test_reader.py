"""Both readers: the same batches in the same order, and resuming at every batch."""

import json

import numpy as np
import pytest

from megatron_r1.config.packages import has_module
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.data.answers import answer_encoder
from megatron_r1.data.example_cache import build_cache
from megatron_r1.data.examples import open_cache
from megatron_r1.data.reader import ExampleReader
from megatron_r1.data.tokenizer import character_tokenizer
from megatron_r1.errors import DataError

needs_dali = pytest.mark.skipif(
    not has_module("nvidia.dali"), reason="NVIDIA DALI is not installed; it comes with the [gpu] extra"
)
READERS = [pytest.param("torch", id="torch"), pytest.param("dali", id="dali", marks=needs_dali)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """23 examples of 4 to 26 tokens, two files."""
    folder = tmp_path_factory.mktemp("examples")
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    for path, numbers in zip(files, (range(15), range(15, 23))):
        turns = [(f"{number}", "x" * (number + 1)) for number in numbers]
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = answer_encoder("plain", character_tokenizer(folder / "tokenizer"))
    return open_cache(build_cache(files, encoder=encoder, max_tokens=99, cache_dir=folder / "cache"))


def config(**changes):
    return SFTDataConfig(
        **{"template": "plain", "batch_sequences": 4, "epochs": 2, "validation": 2, "seed": 3} | changes
    )


def plain(batch):
    """A batch as lists, to compare."""
    return [(s.token_ids.tolist(), s.loss_mask.tolist(), s.token_weight.tolist()) for s in batch]


@pytest.fixture(scope="module")
def expected(store):
    """The batches of the reader in this process."""
    return [plain(batch) for batch in ExampleReader(store, config())]


def test_batches_are_the_orders_examples_with_weights_that_sum_to_one(store, expected):
    reader = ExampleReader(store, config())
    assert [len(batch) for batch in expected] == [4] * 10 + [2]
    assert reader.order.num_steps == 11
    for number, batch in enumerate(reader):
        for example, sequence in zip(reader.order.batch(4 * number), batch, strict=True):
            flat, _ = store.gather([example])
            assert np.where(sequence.loss_mask, ~sequence.token_ids, sequence.token_ids).tolist() == flat.tolist()
            assert not sequence.loss_mask[0] and sequence.loss_mask[-1]
        assert sum(sequence.token_weight.sum() for sequence in batch) == pytest.approx(1, abs=1e-6)
    assert reader.epochs_done == 2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_the_same_batches(store, expected, reader, num_workers):
    own = ExampleReader(store, config(reader=reader, num_workers=num_workers, prefetch_batches=3))
    assert [plain(batch) for batch in own] == expected
    assert list(own) == []


@pytest.mark.parametrize("reader", READERS)
def test_resuming_at_every_batch_is_as_if_nothing_had_happened(store, expected, reader):
    for delivered in range(len(expected) + 1):
        first = ExampleReader(store, config(reader=reader, prefetch_batches=3))
        for _ in range(delivered):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = ExampleReader(store, config(reader=reader))
        second.load_state_dict(state)
        assert [plain(batch) for batch in second] == expected[delivered:]


@pytest.mark.parametrize(("reader", "other"), [("torch", "dali"), ("dali", "torch")])
@needs_dali
def test_one_reader_resumes_the_others_state(store, expected, reader, other):
    first, second = ExampleReader(store, config(reader=reader)), ExampleReader(store, config(reader=other))
    for _ in range(7):
        next(first)
    second.load_state_dict(first.state_dict())
    assert [plain(batch) for batch in second] == expected[7:]


def test_what_workers_read_ahead_is_not_delivered(store, expected):
    first = ExampleReader(store, config(num_workers=1, prefetch_batches=3))
    next(first)
    state = first.state_dict()
    first.close()
    assert state["position"] == 4
    second = ExampleReader(store, config())
    second.load_state_dict(state)
    assert [plain(batch) for batch in second] == expected[1:]


def test_a_reader_can_be_set_back(store, expected):
    reader = ExampleReader(store, config())
    state = reader.state_dict()
    assert [plain(next(reader)) for _ in range(3)] == expected[:3]
    reader.load_state_dict(state)
    assert [plain(batch) for batch in reader] == expected


def test_more_epochs_go_on_after_a_finished_run(store, expected):
    short = ExampleReader(store, config())
    assert len(list(short)) == len(expected)
    longer = ExampleReader(store, config(epochs=3))
    longer.load_state_dict(short.state_dict())
    examples = [tuple(ids) for batch in longer for ids, _, _ in plain(batch)]
    assert len(examples) == len(set(examples)) == 21  # each once: nothing is left out after the short last batch


@pytest.mark.parametrize(
    ("change", "name"), [({"seed": 4}, "seed"), ({"validation": 3}, "validation"), ({"weights": (1.0, 1.0)}, "counts")]
)
def test_a_state_of_another_order_is_refused(store, change, name):
    state = ExampleReader(store, config()).state_dict()
    with pytest.raises(DataError, match=f"{name} is .* must be equal to resume"):
        ExampleReader(store, config(**change)).load_state_dict(state)
    with pytest.raises(DataError, match="examples is other"):
        ExampleReader(store, config()).load_state_dict(state | {"examples": "other"})


def test_validation_is_kept_apart(store, expected):
    reader = ExampleReader(store, config())
    kept = reader.validation_sequences()
    assert len(kept) == 2
    assert sum(sequence.token_weight.sum() for sequence in kept) == pytest.approx(1, abs=1e-6)
    trained = {tuple(ids) for batch in expected for ids, _, _ in batch}
    assert len(trained) == 21 and not trained & {tuple(sequence.token_ids.tolist()) for sequence in kept}
    assert ExampleReader(store, config(validation=0)).validation_sequences() == []


def test_reading_leaves_torchs_random_numbers_alone(store):
    import torch

    torch.manual_seed(0)
    alone = torch.rand(3).tolist()
    torch.manual_seed(0)
    next(ExampleReader(store, config()))
    assert torch.rand(3).tolist() == alone
