"""What a worker says that it holds, on modules of ours, and what the trainer makes of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from megatron_r1.engines.vllm.checks import Layouts, WorkerCheck, compare, own_fingerprints, parts_of, tensors_drawn
from megatron_r1.engines.vllm.destination import Destination
from megatron_r1.engines.vllm.kernels import as_good, sharers_of
from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.layers import group_of_tensor
from megatron_r1.resharding.plan import Shard, Tensor, Want
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
    return {tensor: number for tensor, (known, number) in zip(checked, check.report().tolist(), strict=True) if known}


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


def test_other_numbers_after_the_first_processing_are_no_layout(modules):
    """A layout has the numbers that were placed, if in other places: one changed number is told, at every update."""
    before, layouts = held(modules), Layouts()

    def reorder_and_change() -> None:
        reorder(modules)
        modules[1].weight.data[0, 0] += 1

    for _ in range(2):
        found = updated(modules, layouts, between=reorder_and_change)
        assert found[0] == before[0] and found[1] != before[1]
        before = held(modules)
    layouts = Layouts()
    for _ in range(2):
        assert updated(modules, layouts, between=lambda: reorder(modules))[1] == before[1]
        before = held(modules)
    assert layouts == Layouts(repacked={PLACE})
    assert updated(modules, layouts, between=reorder_and_change)[1] != before[1]


def test_numbers_in_another_shape_must_be_those_that_were_placed(modules):
    """Padded with zeros they are; what has another dtype, or is empty, cannot be compared."""
    before = held(modules)

    def packed(change: float, dtype: torch.dtype = torch.bfloat16) -> dict[int, int]:
        def pack() -> None:
            numbers = torch.cat([modules[1].weight.flip(0).flatten(), torch.zeros(8, dtype=torch.bfloat16)])
            numbers[3] += change
            modules[1].weight = torch.nn.Parameter(numbers.to(dtype), requires_grad=False)

        found = updated(modules, Layouts(), between=pack)
        modules[1].weight = torch.nn.Parameter(kept.clone(), requires_grad=False)
        return found

    kept = modules[1].weight.clone()
    assert packed(0) == before
    assert packed(0.5)[0] == before[0] and packed(0.5)[1] != before[1]
    assert packed(0.5, torch.float32) == before


@pytest.mark.parametrize("filled", [True, False])
def test_a_vocabulary_that_is_filled_up_is_compared_too(filled):
    """What no tensor goes to must be known as 0, or nothing can be said of the whole."""
    torch.manual_seed(0)
    module = Module((6, 6), torch.bfloat16, processes=True)
    module.weight.data[4:] = 0
    place, layouts = Destination(1, LINEAR, "embed", module, "weight", 0, 6, 1), Layouts()
    check = WorkerCheck([place], SPECS, ["a", "a"], [1], layouts, [("embed", "weight")] if filled else [])
    check.placed("a")
    expected = int(fingerprint(module.weight[:4], LINEAR))
    module.weight.data[0, 0] += 1
    assert (check.report()[0, -1] == expected) == (not filled)


def test_a_quantised_module_may_scale_anew():
    """Its kernels may want scales that are powers of two: codes and scales are then others."""
    torch.manual_seed(0)
    module = Module((4, 6), torch.float8_e4m3fn, processes=True)
    module.scale = torch.nn.Parameter(torch.rand(4, 1), requires_grad=False)
    specs = [("linear.weight", torch.float8_e4m3fn, (4, 6)), ("linear.scale", torch.float32, (4, 1))]
    places = [
        Destination(0, LINEAR, "linear", module, "weight", 0, 6, 1),
        Destination(1, Box(0, 4, 0, 1), "linear", module, "scale", 0, 1, 1),
    ]
    check = WorkerCheck(places, specs, ["a", "a"], [0, 1], Layouts())
    check.placed("a")
    expected = [int(each.fingerprint) for parts in check.loaded.values() for each in parts]
    module.weight.data.copy_(torch.randn(4, 6))
    module.scale.data.mul_(2)
    assert check.report()[:, -1].tolist() == expected


def test_a_vector_is_read_as_the_model_has_it_from_the_first_update_on():
    """The router's bias lies in a module that processes weights."""
    torch.manual_seed(0)
    module = Module((6,), torch.float32, processes=True)
    check = WorkerCheck([Destination(0, NORM, "gate", module, "weight", 0, 1, 1)], SPECS, ["a"], [0], Layouts())
    check.placed("a")
    module.weight.data.copy_(module.weight.flip(0))
    assert check.report()[0, -1] == int(fingerprint(module.weight.view(6, 1), NORM))


class Packing(Module):
    """As a linear layer of vLLM's on a CPU: `pack` gives its kernel a copy that nobody can read, and empties it."""

    def __init__(self) -> None:
        super().__init__((8, 6), torch.float32, processes=True)
        self.pack()

    def load(self) -> None:
        self.weight = torch.nn.Parameter(torch.randn(8, 6), requires_grad=False)

    def pack(self, change: float = 0, *, empties: bool = True) -> None:
        copy = self.weight.clone()
        copy[5] += change
        self.cpu_linear = lambda rows, weight, bias: rows @ copy.T
        if empties:
            self.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


@pytest.mark.parametrize("empties", [True, False])
def test_a_kernel_is_asked_for_what_it_computes_with(empties):
    """Of a matrix that is made of two tensors. A changed row is told of the tensor that it belongs to alone."""
    torch.manual_seed(0)
    module, layouts = Packing(), Layouts()
    specs = [("up.weight", torch.float32, (4, 6)), ("gate.weight", torch.float32, (4, 6))]
    places = [Destination(part, LINEAR, "linear", module, "weight", part * 24, 6, 1) for part in (0, 1)]
    for change in (0, 1e-6, 0, 1e-6):
        module.load()
        check = WorkerCheck(places, specs, ["a", "a"], [0, 1], layouts)
        check.placed("a")
        expected = [int(fingerprint(module.weight[part * 4 : part * 4 + 4], LINEAR)) for part in (0, 1)]
        module.pack(change, empties=empties)
        found = check.report()[:, -1].tolist()
        assert found[0] == expected[0] and (found[1] == expected[1]) == (change == 0)


def test_a_kernel_that_kept_its_old_copy_is_told():
    torch.manual_seed(0)
    module, spec = Packing(), [("linear.weight", torch.float32, (8, 6))]
    box, layouts = Box(0, 8, 0, 6), Layouts()
    for repacks in (False, True, False):
        module.load()
        check = WorkerCheck([Destination(0, box, "linear", module, "weight", 0, 6, 1)], spec, ["a"], [0], layouts)
        check.placed("a")
        expected = int(fingerprint(module.weight, box))
        if repacks:
            module.pack()
        else:
            module.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        assert (check.report()[0, -1] == expected) == repacks


def test_a_tied_head_that_kept_its_old_copy_is_told():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"embed": Packing(), "head": Packing(), "norm": Module((6,), torch.float32, processes=False)}
    )
    embed, head = model["embed"], model["head"]
    embed.load()
    head.weight = embed.weight
    assert sharers_of(model) == {"embed": [head], "head": [embed]}
    box, spec = Box(0, 8, 0, 6), [("embed.weight", torch.float32, (8, 6))]
    for follows in (True, False):
        place = Destination(0, box, "embed", embed, "weight", 0, 6, 1)
        check = WorkerCheck([place], spec, ["a"], [0], Layouts(), (), sharers_of(model))
        embed.weight.data.normal_()
        check.placed("a")
        expected = int(fingerprint(embed.weight, box))
        embed.pack(empties=False)
        if follows:
            head.pack(empties=False)
        assert (check.report()[0, -1] == expected) == follows


def test_how_kernels_may_round():
    """In bf16, tiny numbers to 0. -0 is 0."""
    placed = torch.tensor([1.003, 1.003, 1.003, 1e-40, 1e-30, -0.0, 1.0])
    found = torch.tensor([1.003, 1.0, 1.01, 0.0, 0.0, 0.0, torch.nan])
    assert as_good(found, placed).tolist() == [True, True, False, True, False, True, False]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_kernel_that_answers_no_number_is_told_but_where_the_weights_have_none(bad):
    """One that is not finite makes all answers of its row so, whatever was asked for."""
    torch.manual_seed(0)
    spec, box = [("linear.weight", torch.float32, (8, 6))], Box(0, 8, 0, 6)
    for spoils, breaks in ((False, False), (True, False), (False, True), (True, True)):
        module = Packing()
        module.load()
        if spoils:
            module.weight.data[2, 3] = bad
        check = WorkerCheck([Destination(0, box, "linear", module, "weight", 0, 6, 1)], spec, ["a"], [0], Layouts())
        check.placed("a")
        expected = int(fingerprint(module.weight, box))
        module.pack(bad if breaks else 0)
        assert (check.report()[0, -1] == expected) != breaks


def test_a_part_of_a_parameter_stands_for_all_of_it(modules):
    """Of an update in which one of two tensors is compared: what its kernel has reordered is known whole."""
    torch.manual_seed(0)
    specs = [("up.weight", torch.bfloat16, (4, 6)), ("gate.weight", torch.bfloat16, (4, 6))]
    module, layouts = Module((8, 6), torch.bfloat16, processes=True), Layouts()
    places = [Destination(part, LINEAR, "linear", module, "weight", part * 24, 6, 1) for part in (0, 1)]
    for change in (0, 0.5, 0):
        check = WorkerCheck(places, specs, ["a", "a"], [1], layouts)
        check.placed("a")
        expected = int(fingerprint(module.weight[4:], LINEAR))
        module.weight.data.copy_(module.weight.flip(0))
        module.weight.data[7, 0] += change  # a number of the other tensor
        assert (check.report()[0, -1] == expected) == (change == 0)
        module.weight.data.normal_()


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
    workers = [wants for server in servers for wants in server]
    parts = parts_of([*workers, workers[1]], [0, 1])
    assert parts.rows.tolist() == [[0, *NORM], [1, *rest], [1, *middle]]
    assert [own.tolist() for own in parts.of_worker] == [[0, 2], [0, 1], [2], [0, 1]]
    assert parts_of(workers, [0]).rows.tolist() == [[0, *NORM]]
    shares = [own_fingerprints(parts.rows, source, SPECS, rank) for rank in (0, 1)]  # pyright: ignore[reportArgumentType]
    matrix = source.weights[1].bfloat16()
    assert (shares[0] + shares[1]).tolist() == [
        int(fingerprint(source.weights[0], NORM)),
        int(fingerprint(matrix[:, :2], rest)),
        int(fingerprint(matrix[:, 2:5], middle)),
    ]


def test_a_difference_is_named():
    parts = parts_of([[Want(0, NORM), Want(1, LINEAR)], [Want(1, LINEAR), Want(0, NORM)]], [0, 1])
    expected, names = np.array([5, 7]), ["worker 0 of vllm-0", "worker 1 of vllm-0"]

    def found(*second: list[int]) -> None:
        first = torch.tensor([[1, 5], [1, 7]])
        compare([first, torch.tensor(second)], expected, parts, SPECS, names)

    found([1, 7], [1, 5])
    found([1, 7], [0, 0])  # its parameter rounds
    for wrong in ([1, 6], [-1, 0]):  # another number, or it was never placed
        with pytest.raises(EngineError, match=r"norm\.weight, rows 0 to 6, columns 0 to 1, on worker 1 of vllm-0\. It"):
            found([1, 7], wrong)
    with pytest.raises(EngineError, match="worker 1 of vllm-0 answered for 1 parts of tensors, and takes 2"):
        found([1, 7])


def test_what_was_never_placed_is_said(modules):
    """But not of a part that has no numbers, as of a vocabulary of which a worker has no row: none comes."""
    nothing = Destination(0, Box(6, 6, 0, 1), "norm", modules[0], "weight", 0, 1, 1)
    check = WorkerCheck([*destinations(modules), nothing], SPECS, ["a", "b"], [0, 1], Layouts())
    check.placed("b")
    assert check.report().tolist() == [[-1, 0], [1, held(modules)[1]], [1, 0]]


def test_every_tensor_has_its_turn_and_experts_of_a_layer_are_one():
    """3 layers of a norm and two matrices of 4 experts, and a head: 10 kinds."""
    names = [f"model.layers.{layer}.norm.weight" for layer in range(3)] + ["lm_head.weight"]
    names += [
        f"model.layers.{n}.mlp.experts.{e}.{w}.weight" for n in range(3) for e in range(4) for w in ("up", "down")
    ]
    tensors = [Tensor(name, 4, 4, 2, group_of_tensor(name)) for name in names]
    seen = [tensors_drawn(tensors, update, 3) for update in range(40)]
    assert all(len(set(each)) == 3 and each == sorted(each) for each in seen)
    kinds = [{re.sub(r"experts\.\d", "experts", names[number]) for number in each} for each in seen]
    assert len(set().union(*kinds[:4])) == 10  # 12 draws
    counts = [sum(number in each for each in seen) for number in range(len(names))]
    assert counts == [12] * 4 + [3] * 24  # of 120 draws
    assert tensors_drawn(tensors, 5, 28) == list(range(28)) and tensors_drawn([], 0, 3) == []
