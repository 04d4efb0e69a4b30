"""Every plan, for random pairs of layouts: each byte once, from who holds it, within bounds, from all alike."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from layout_pairs import MODELS, Served, pairs, shape_of

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.engines.vllm.messages import messages_of
from megatron_r1.errors import EngineError
from megatron_r1.planning.holdings import sent_entries, server_wants, trainer_shards, wire_tensors
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard, Tensor, Want, check_wanted, make_plan, rounds_of
from megatron_r1.resharding.rounds import layer_order
from megatron_r1.resharding.takes import numbers_of

BUCKET = 1 << 12


class Case:
    def __init__(self, model: str, trainer: ParallelConfig, served: Served) -> None:
        shape = shape_of(model)
        self.tensors = wire_tensors(sent_entries(shape))
        self.shards = trainer_shards(shape, trainer)
        wants = server_wants(
            shape, tensor=served.tensor, expert_parallel=served.expert_parallel, pipeline=served.pipeline
        )
        self.servers = [wants] * served.replicas
        self.workers = [worker for server in self.servers for worker in server]


@settings(max_examples=500)
@given(pairs())
def test_any_pair_of_layouts(pair):
    case = Case(*pair)
    plan = make_plan(case.tensors, case.shards, case.servers, BUCKET, grain=64)
    written_once(case, plan)
    sent_by_holders(case, plan)
    within_buffers(plan)
    loads_are_level(case, plan)
    told_as_numbers(case, plan)


def told_as_numbers(case, plan):
    """What a worker is told gives its messages again."""
    for worker in range(len(case.workers)):
        told = torch.from_numpy(plan.numbers(worker))
        assert messages_of(told, worker, case.tensors) == plan.received.get(worker, [])


def written_once(case, plan):
    """Each number of each want, by counting writes into an array of its size."""
    counts = [[np.zeros((want.box.rows, want.box.columns), np.int8) for want in wants] for wants in case.workers]
    for message in plan.messages:
        for want, tensor, (top, bottom, left, right) in message.pieces:
            wanted = case.workers[message.worker][want]
            assert wanted.tensor == tensor
            assert top >= wanted.box.top and bottom <= wanted.box.bottom
            assert left >= wanted.box.left and right <= wanted.box.right
            place = counts[message.worker][want]
            place[top - wanted.box.top : bottom - wanted.box.top, left - wanted.box.left : right - wanted.box.left] += 1
    assert all((place == 1).all() for places in counts for place in places)


def sent_by_holders(case, plan):
    held = defaultdict(list)
    for tensor, box, ranks in case.shards:
        for rank in ranks:
            held[rank, tensor].append(box)
    for message in plan.messages:
        for piece in message.pieces:
            assert any(box.meet(piece.box) == piece.box for box in held[message.sender, piece.tensor])


def within_buffers(plan):
    """Of a rank and of a worker, in each round; and one message a pair and round."""
    for own in (*plan.sent.values(), *plan.received.values()):
        assert all(sum(message.num_bytes for message in group) <= BUCKET for group in rounds_of(own))
        assert [message.round for message in own] == sorted(message.round for message in own)
    ends = [(message.round, message.sender, message.worker, message.num_bytes) for message in plan.messages]
    assert plan.sizes.T.tolist() == [list(each) for each in ends] and ends == sorted(ends)
    pairs_of_rounds = Counter((message.round, message.sender, message.worker) for message in plan.messages)
    assert set(pairs_of_rounds.values()) <= {1}


def loads_are_level(case, plan):
    """The busiest rank sends at most 1.15 times the mean of those that could take over some of what it sends, or of
    what they then send: whatever it holds, its replicas hold."""
    loads, served_by = Counter(), defaultdict(set)
    ranks_of = {(tensor, box): ranks for tensor, box, ranks in case.shards}
    boxes_of = defaultdict(list)
    for tensor, box in ranks_of:
        boxes_of[tensor].append(box)
    largest_row = 0
    for message in plan.messages:
        for _, tensor, box in message.pieces:
            size = box.size * case.tensors[tensor].itemsize
            loads[message.sender] += size
            largest_row = max(largest_row, box.columns * case.tensors[tensor].itemsize)
            (shard,) = (own for own in boxes_of[tensor] if own.meet(box))
            served_by[message.sender].add(ranks_of[tensor, shard])
    busiest = max(loads, key=loads.__getitem__)
    reached, waiting = {busiest}, [busiest]
    while waiting:
        for ranks in served_by[waiting.pop()]:
            waiting += [rank for rank in ranks if rank not in reached]
            reached |= set(ranks)
    mean = sum(loads[rank] for rank in reached) / len(reached)
    assert loads[busiest] <= 1.15 * mean + max(64, largest_row)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_shards_of_the_trainer_are_the_whole_model(model):
    """TP2 PP2 EP2: each number of each tensor lies on one shard."""
    shape = shape_of(model)
    parallel = ParallelConfig(tensor=2, pipeline_parallel=2, expert=2 if shape.moe else 1, sequence=True, world_size=8)
    tensors = wire_tensors(sent_entries(shape))
    counts = [np.zeros((tensor.rows, tensor.columns), np.int8) for tensor in tensors]
    for tensor, box, _ in trainer_shards(shape, parallel):
        counts[tensor][box.top : box.bottom, box.left : box.right] += 1
    assert all((count == 1).all() for count in counts)


def test_two_servers_are_fed_by_different_replicas():
    """4 ranks hold one tensor of 400 rows, 2 servers of 2 workers want halves: each rank sends 200 rows, all to one
    server."""
    tensors = [Tensor("a", 400, 8, 2, "layer")]
    halves = [[Want(0, Box(0, 200, 0, 8))], [Want(0, Box(200, 400, 0, 8))]]
    plan = make_plan(tensors, [Shard(0, Box(0, 400, 0, 8), (0, 1, 2, 3))], [halves, halves], 1 << 20, grain=64)
    assert {(m.sender, m.worker, m.num_bytes) for m in plan.messages} == {
        (0, 0, 3200), (1, 1, 3200), (2, 2, 3200), (3, 3, 3200),
    }  # fmt: skip


def test_a_piece_above_the_bucket_is_cut():
    """3 rows of 100 fp32 numbers in buckets of 320 bytes: parts of at most 80 numbers, in rounds of their own."""
    tensors = [Tensor("a", 3, 100, 4, "layer")]
    plan = make_plan(tensors, [Shard(0, Box(0, 3, 0, 100), (0,))], [[[Want(0, Box(0, 3, 0, 100))]]], 320)
    assert [m.num_bytes for m in plan.messages] == [320, 80, 320, 80, 320, 80]
    assert [m.round for m in plan.messages] == [0, 1, 2, 3, 4, 5]


def test_where_nothing_is_wanted_nothing_is_sent():
    """As of a rank alone, which saves what it holds itself."""
    plan = make_plan([Tensor("a", 4, 2, 4, "a")], [Shard(0, Box(0, 4, 0, 2), (0,))], [[[]]], 1 << 20)
    assert not plan.messages and not plan.sent and not plan.received and plan.num_bytes == 0
    assert plan.sizes.shape == (4, 0) and plan.numbers(0).shape == (0, 8)


def test_wants_may_be_numbers():
    """What workers send rank 0 need not become objects: the plan is the same."""
    tensors = [Tensor("a", 400, 8, 2, "layer"), Tensor("b", 16, 1, 4, "norm")]
    shards = [
        Shard(0, Box(0, 100, 0, 8), (0,)),
        Shard(0, Box(100, 400, 0, 8), (1, 2)),
        Shard(1, Box(0, 16, 0, 1), (0,)),
    ]
    server = [[Want(1, Box(0, 16, 0, 1)), Want(0, Box(0, 200, 0, 8))], [Want(0, Box(200, 400, 0, 8))]]
    plans = [make_plan(tensors, shards, [[form(own) for own in server]], 1 << 10, 64) for form in (list, numbers_of)]
    assert plans[0].messages == plans[1].messages
    assert sum(message.num_bytes for message in plans[0].messages) == plans[0].num_bytes == 400 * 16 + 16 * 4


def test_a_server_of_more_workers_than_a_stage_has_ranks_takes_layers_of_several_stages():
    """Stages of 2, 2 and 2 ranks hold two layers each. A server of 4 workers needs two stages at a time; two servers
    of 2 workers need one each, and begin apart."""
    layers = {f"{stage}{layer}": frozenset({2 * stage, 2 * stage + 1}) for stage in range(3) for layer in range(2)}
    assert list(layer_order(layers, 0, 1, 4)) == [("00", "10"), ("20",), ("01", "11"), ("21",)]
    assert list(layer_order(layers, 0, 2, 2)) == [("00",), ("10",), ("01",), ("11",), ("20",), ("21",)]
    assert next(layer_order(layers, 1, 2, 2)) == ("10",)


NORM = [Tensor("model.norm.weight", 8, 1, 2, "model.norm")]


@pytest.mark.parametrize(("shards", "held"), [([Shard(0, Box(0, 6, 0, 1), (0,))], 6), ([], 0)], ids=["part", "layer"])
def test_what_nobody_holds_is_refused(shards, held):
    with pytest.raises(EngineError, match=rf"wants 8 numbers of model\.norm\.weight, of which .* hold {held}"):
        make_plan(NORM, shards, [[[Want(0, Box(0, 8, 0, 1))]]], 1 << 20)


def test_what_a_server_takes_nothing_of_is_refused():
    """A tensor may be one worker's alone; it must be some worker's of every server."""
    tensors = [*NORM, Tensor("lm_head.weight", 8, 4, 2, "lm_head")]
    norm, head = Want(0, Box(0, 8, 0, 1)), Want(1, Box(0, 8, 0, 4))
    check_wanted(tensors, [[[norm], [head]]])
    check_wanted(tensors, [[[], numbers_of([norm, head])]])
    with pytest.raises(EngineError, match=r"server 1 takes nothing of lm_head\.weight \(1 of 2"):
        check_wanted(tensors, [[[norm], [head]], [[norm], [norm]]])


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([(0, 4, 0, 4), (4, 6, 0, 4)], "takes 6 x 4 of the 8 x 4 numbers of lm_head"),
        ([(2, 4, 0, 4), (4, 8, 0, 4)], "takes 6 x 4 of the 8 x 4 numbers of lm_head"),
        ([(0, 8, 0, 2)], "takes 8 x 2 of the 8 x 4 numbers of lm_head"),
        ([(0, 8, 1, 4)], "takes 8 x 3 of the 8 x 4 numbers of lm_head"),
        ([(0, 2, 0, 4), (6, 8, 0, 4)], "takes 8 x 4 of the 8 x 4 numbers of lm_head"),
    ],
    ids=["last rows", "first rows", "last columns", "first columns", "between"],
)
def test_what_a_server_takes_a_part_of_is_refused(boxes, said):
    """vLLM's loaders narrow what is larger than their parameter, and say nothing: a server of a smaller model."""
    tensors = [Tensor("lm_head.weight", 8, 4, 2, "lm_head")]
    with pytest.raises(EngineError, match=said):
        check_wanted(tensors, [[[Want(0, Box(*box))] for box in boxes]])
    check_wanted(tensors, [[[Want(0, Box(0, 8, 0, 2))], [Want(0, Box(0, 8, 2, 4)), Want(0, Box(0, 8, 2, 4))]]])


def test_a_worker_may_want_no_rows_of_a_layer():
    """One whose share of a vocabulary is all padding, or a layer that no worker of a server takes anything of."""
    shards, norm = [Shard(0, Box(0, 8, 0, 1), (0,))], Want(0, Box(0, 8, 0, 1))
    none = Want(0, Box(8, 8, 0, 1))
    (message,) = make_plan(NORM, shards, [[[norm], [none]]], 1 << 20).messages
    assert (message.worker, message.num_bytes) == (0, 16)
    for wants in ([none], []):
        assert make_plan(NORM, shards, [[wants]], 1 << 20).messages == ()
