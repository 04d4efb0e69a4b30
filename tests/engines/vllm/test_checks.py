"""What a worker says that it holds, on modules of ours, and what the trainer makes of it."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.engines.vllm.checks import Layouts, WorkerCheck, compare, own_fingerprints, parts_wanted
from megatron_r1.engines.vllm.destination import Destination
from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard, Want
from megatron_r1.weights.fingerprint import fingerprint

SPECS = [("norm.weight", torch.float32, (6,)), ("linear.weight", torch.bfloat16, (4, 6))]
NORM, LINEAR = Box(0, 6, 0, 1), Box(0, 4, 0, 6)


class Module(torch.nn.Module):
    """`processes`: as modules of vLLM's that bring their weights into another form."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, processes: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False)
        if processes:
            self.quant_method = object()


@pytest.fixture
def modules() -> list[Module]:
    torch.manual_seed(0)
    return [Module((6,), torch.float32, processes=False), Module((4, 6), torch.bfloat16, processes=True)]


def destinations(modules: list[Module]) -> list[Destination]:
    return [
        Destination(0, NORM, "norm", modules[0], "weight", 0, 1, 1),
        Destination(1, LINEAR, "linear", modules[1], "weight", 0, 6, 1),
    ]


def updated(modules, layouts, *, between=lambda: None, checked=(0, 1)) -> dict[int, int]:
    check = WorkerCheck(destinations(modules), SPECS, ["a", "b"], checked, layouts)
    check.placed("a")
    check.placed("b")
    between()
    return {row[0]: row[-1] for row in check.report().tolist()}


def held(modules) -> dict[int, int]:
    boxes = (NORM, LINEAR)
    return {n: int(fingerprint(each.weight.view(len(each.weight), -1), boxes[n])) for n, each in enumerate(modules)}


PLACE = ("linear", "weight")


def reorder(modules) -> None:
    """As a kernel that wants its rows in another order."""
    modules[1].weight.data.copy_(modules[1].weight.flip(0))


def test_it_says_what_the_model_runs_with(modules):
    before = held(modules)
    assert updated(modules, Layouts()) == before
    assert updated(modules, Layouts(), checked=[1]) == {1: before[1]}


def test_a_parameter_of_another_dtype(modules):
    """A wider one holds the same numbers; a narrower one, or another of its width, rounds them, and nothing is said of
    it."""
    before = held(modules)
    modules[1].weight = torch.nn.Parameter(modules[1].weight.float(), requires_grad=False)
    assert updated(modules, Layouts()) == before
    modules[0].weight = torch.nn.Parameter(modules[0].weight.bfloat16(), requires_grad=False)
    assert updated(modules, Layouts()) == {1: before[1]}
    modules[1].weight = torch.nn.Parameter(modules[1].weight.half(), requires_grad=False)
    assert updated(modules, Layouts()) == {}


def test_a_norm_that_is_changed_after_it_was_placed_is_told(modules):
    before, layouts = held(modules), Layouts()
    for _ in range(2):
        found = updated(modules, layouts, between=lambda: modules[0].weight.data.add_(1))
        assert found == held(modules) and found[0] != before[0]
        before = held(modules)


def test_a_weight_that_kernels_want_otherwise_is_read_before(modules):
    """Its numbers in another order, or in another shape; known from the first update on."""
    before, layouts = held(modules), Layouts()
    for _ in range(2):
        assert updated(modules, layouts, between=lambda: reorder(modules)) == before
        assert layouts == Layouts(repacked={PLACE})
        before = held(modules)

    def packed() -> None:
        modules[1].weight = torch.nn.Parameter(torch.zeros(24), requires_grad=False)

    layouts = Layouts()
    assert updated(modules, layouts, between=packed) == before
    assert layouts == Layouts(repacked={PLACE})


def test_a_matrix_that_was_kept_as_it_is_must_stay_so(modules):
    """From the second update on it is known that its kernel takes the checkpoint's layout."""
    before, layouts = held(modules), Layouts()
    assert updated(modules, layouts) == before and layouts == Layouts(kept={PLACE})
    found = updated(modules, layouts, between=lambda: modules[1].weight.data.zero_())
    assert found[1] == 0 != before[1]


def test_numbers_that_are_all_the_same_do_not_tell_the_layout(modules):
    """Reordered zeros are zeros: it is seen at the next update that they were reordered."""
    numbers, layouts = modules[1].weight.clone(), Layouts()
    modules[1].weight.data.zero_()
    updated(modules, layouts, between=lambda: reorder(modules))
    assert layouts == Layouts()
    modules[1].weight.data.copy_(numbers)
    before = held(modules)
    assert updated(modules, layouts, between=lambda: reorder(modules)) == before
    assert layouts == Layouts(repacked={PLACE})


class Source:
    """Rank r of two holds columns 3 r to 3 r + 3 of the matrix, both the norm, in float32."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.shards = [Shard(0, NORM, (0, 1)), Shard(1, Box(0, 4, 0, 3), (0,)), Shard(1, Box(0, 4, 3, 6), (1,))]
        torch.manual_seed(3)
        self.weights = [torch.randn(6, 1), torch.randn(4, 6)]

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        return self.weights[tensor][box.top : box.bottom, box.left : box.right]


def test_ranks_shares_add_up_to_what_workers_took():
    """Of workers that took other parts than the ranks hold."""
    source: Source = Source()
    middle, rest = Box(0, 4, 2, 5), Box(0, 4, 0, 2)
    servers = [[[Want(0, NORM), Want(1, middle)], [Want(0, NORM), Want(1, rest)]], [[Want(1, middle)]]]
    wanted = parts_wanted(servers, [0, 1])
    assert wanted == [(0, NORM), (1, rest), (1, middle)]
    assert parts_wanted(servers, [0]) == [(0, NORM)]
    shares = [own_fingerprints(wanted, source, SPECS, rank) for rank in (0, 1)]  # pyright: ignore[reportArgumentType]
    matrix = source.weights[1].bfloat16()
    assert (shares[0] + shares[1]).tolist() == [
        int(fingerprint(source.weights[0], NORM)),
        int(fingerprint(matrix[:, :2], rest)),
        int(fingerprint(matrix[:, 2:5], middle)),
    ]


def test_a_difference_is_named():
    expected = {(0, NORM): 5, (1, LINEAR): 7}
    rows = torch.tensor([[0, *NORM, 5], [1, *LINEAR, 7]])
    compare([rows, rows], expected, SPECS, ["worker 0 of vllm-0", "worker 1 of vllm-0"])
    other = rows.clone()
    other[0, -1] = 6
    with pytest.raises(EngineError, match=r"norm\.weight, rows 0 to 6, columns 0 to 1, on worker 1 of vllm-0"):
        compare([rows, other], expected, SPECS, ["worker 0 of vllm-0", "worker 1 of vllm-0"])
