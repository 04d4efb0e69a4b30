"""After a push: do the servers hold what the trainer holds? vLLM is not imported.

Fingerprints (weights/fingerprint.py) of the parts that each worker took, read back from its parameters, against those
of the same parts by the trainer's ranks.

A worker reads what its model runs with wherever that still has the checkpoint's layout. Some kernels want another
(packed matrices on CPUs, shuffled experts on GPUs): those parameters are read when all their parts have been placed,
before they are processed. Which they are is found at the first update (later for those whose numbers were all the same
then), and only among matrices of modules that have a method to process weights: norms, and biases of routers and other
layers, are always read as the model has them.

Numbers in another place after processing are a layout. Other numbers are not, unless the module is quantised, whose
kernels may scale anew: so a parameter must have the numbers that were placed, in any order. A matrix whose kernel has a
packed copy that cannot be read (on CPUs) is asked for some of its columns, and packed experts for what they compute
(kernels.py).
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from megatron_r1.engines.source import ShardedSource
from megatron_r1.engines.vllm.destination import Destination
from megatron_r1.engines.vllm.kernels import Answers, Columns, answers, columns_to_ask_for, wrong_experts
from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.takes import Numbers, Tensor, Wants, numbers_of
from megatron_r1.weights.fingerprint import content, fingerprint
from megatron_r1.weights.wire import ParamSpec

FAULTS_SHOWN = 5
EXPERTS = ("w13_weight", "w2_weight")
"""What vLLM calls the parameters of a layer's experts."""
NUMBER = re.compile(r"\.\d+")


@dataclass
class Layouts:
    """What is known of parameters (module name, name) whose module processes weights, from one update to the next:
    `kept` run in the checkpoint's layout, `repacked` do not."""

    kept: set[tuple[str, str]] = field(default_factory=set)
    repacked: set[tuple[str, str]] = field(default_factory=set)
    draw: random.Random = field(default_factory=lambda: random.Random(0), compare=False)
    """Draws the columns that kernels are asked for."""


class WorkerCheck:
    """A worker's part of one update: call `placed` before a layer is processed, `report` when all are."""

    def __init__(
        self,
        destinations: Sequence[Destination],
        specs: Sequence[ParamSpec],
        layers: Sequence[str],
        checked: Collection[int],
        layouts: Layouts,
        filled: Collection[tuple[str, str]] = (),
        sharers: Mapping[str, Sequence[torch.nn.Module]] = MappingProxyType({}),
    ) -> None:
        """`specs`, `layers`: by tensor. `checked`: tensors. `filled`: parameters (module name, name) that are 0 where
        no tensor goes. `sharers`: see kernels.py."""
        self.destinations, self.specs, self.layouts = destinations, specs, layouts
        self.filled, self.sharers = filled, sharers
        self.by_layer: dict[str, list[int]] = {}
        self.written: Counter[tuple[str, str]] = Counter()
        """Numbers that come for each parameter, be they checked or not."""
        self.quantised: set[str] = set()
        """Modules."""
        for number, destination in enumerate(destinations):
            if specs[destination.tensor][1].itemsize < 2:
                self.quantised.add(destination.module_name)
            self.written[place_of(destination)] += destination.box.size
            if destination.tensor in checked:
                self.by_layer.setdefault(layers[destination.tensor], []).append(number)
        self.said: dict[int, tuple[int, int]] = {}
        """By destination that is checked: 1 and the fingerprint, or 0 twice where the parameter rounds it."""
        self.loaded: dict[tuple[str, str], list[_Placed]] = {}
        """By parameter."""
        self.contents: dict[tuple[str, str], int] = {}
        """Of parameters before they were processed, where that is known whole and must stay."""
        self.answers: dict[str, Answers] = {}
        """What experts that are checked should compute, by module."""

    def placed(self, layer: str) -> None:
        """The parameters of the layer are as the checkpoint has them, and whole."""
        found: dict[tuple[str, str], list[_Placed]] = {}
        for number in self.by_layer.get(layer, ()):
            destination = self.destinations[number]
            place = place_of(destination)
            values, (_, dtype, _) = destination.view(destination.box), self.specs[destination.tensor]
            if values.dtype != dtype and values.dtype.itemsize <= dtype.itemsize:
                self.said[number] = (0, 0)
                continue
            known = place in self.layouts.kept or place in self.layouts.repacked
            varied = not known and bool((values != values[:1, :1]).any())
            own = self.fingerprint_of(destination)
            sharers = self.sharers.get(destination.module_name, ())
            columns = columns_to_ask_for(destination, values, self.layouts.draw, sharers)
            found.setdefault(place, []).append(
                _Placed(number, destination, own, layout_of(destination), varied, columns)
            )
        for place, parts in found.items():
            parameter = getattr(parts[0].destination.module, place[1])
            whole = self.written[place] == parameter.numel() or place in self.filled
            settled = place in self.layouts.kept or place[0] in self.quantised
            if whole and may_reorder(parts) and not settled:
                self.contents[place] = int(content(parameter))
        self.loaded |= found
        for name in dict.fromkeys(name for name, _ in found):
            own = [part for each in EXPERTS for part in found.get((name, each), ())]
            if any((name, each) in self.contents for each in EXPERTS):
                asked = answers(own[0].destination.module, sorted({expert_of(part) for part in own}))
                if asked is not None:
                    self.answers[name] = asked

    def report(self) -> torch.Tensor:
        """int64[parts, 2], in the order of the destinations that are checked: 1 and the fingerprint; 0 twice where the
        parameter rounds the part, and nothing can be said of it; -1 and 0 where it was never placed."""
        wrong: dict[str, set[int]] = {}
        for place, parts in self.loaded.items():
            if place[0] in self.answers and place[0] not in wrong:
                wrong[place[0]] = wrong_experts(parts[0].destination.module, self.answers[place[0]])
            before = [int(part.fingerprint) for part in parts]
            served = self.served(place, parts, before)
            for part, number in zip(parts, served, strict=True):
                number += int(self.difference(part))
                blamed = place[1] in EXPERTS and expert_of(part) in wrong.get(place[0], ())
                if blamed and number == int(part.fingerprint):
                    number = ~number
                self.said[part.number] = (1, signed(number))
        checked = sorted(number for numbers in self.by_layer.values() for number in numbers)
        # Of a part without numbers nothing comes.
        absent = [(-1 if self.destinations[number].box.size else 1, 0) for number in checked]
        rows = [self.said.get(number, row) for number, row in zip(checked, absent, strict=True)]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)

    def served(self, place: tuple[str, str], parts: Sequence[_Placed], before: list[int]) -> list[int]:
        """Fingerprints of a parameter's parts as the model runs with them, or, where its kernel has another layout, as
        they were placed. Numbers that are all the same do not tell which it is."""
        kept, repacked = self.layouts.kept, self.layouts.repacked
        parameter, first = getattr(parts[0].destination.module, place[1], None), parts[0].layout
        moved = any(layout_of(part.destination) != part.layout for part in parts)
        if parameter is not None and first is not None and len(first.shape) == 1 and parameter.shape == first.shape:
            moved = False  # a vector, be it in another dtype
        if place in repacked or moved:
            repacked.add(place)
            return before if self.same_content(place, parameter, parts) else [~number for number in before]
        served = [int(self.fingerprint_of(part.destination)) for part in parts]
        if served != before and may_reorder(parts) and place not in kept and parameter is not None:
            if parameter.dim() > 1 and self.same_content(place, parameter, parts):
                repacked.add(place)
                return before
        elif processes(parts) and any(part.varied for part in parts):
            kept.add(place)
        return served

    def same_content(self, place: tuple[str, str], parameter: torch.Tensor | None, parts: Sequence[_Placed]) -> bool:
        """Whether the model's `parameter` has the numbers that were placed, in any order. True where that cannot be
        told: the kernel has emptied it, or has another dtype."""
        if place not in self.contents or parameter is None or not parameter.numel():
            return True
        first = parts[0].layout
        return first is None or parameter.dtype != first.dtype or int(content(parameter)) == self.contents[place]

    def difference(self, part: _Placed) -> torch.Tensor:
        """int64 scalar: by what the part's fingerprint changes with the columns that its kernel has."""
        box, (_, dtype, _) = part.destination.box, self.specs[part.destination.tensor]
        total = torch.zeros((), dtype=torch.int64)
        for column, placed, found in part.columns.compared() if part.columns is not None else ():
            where = box._replace(left=box.left + column, right=box.left + column + 1)
            total += fingerprint(found.to(dtype), where) - fingerprint(placed.to(dtype), where)
        return total

    def fingerprint_of(self, destination: Destination) -> torch.Tensor:
        """In the wire's dtype: a parameter may have a wider one."""
        _, dtype, _ = self.specs[destination.tensor]
        return fingerprint(destination.view(destination.box).to(dtype), destination.box)


class Layout(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Placed:
    number: int
    """Of the destination."""
    destination: Destination
    fingerprint: torch.Tensor
    layout: Layout | None
    varied: bool
    """The part has different numbers."""
    columns: Columns | None
    """Some of them, where a kernel can be asked for its own."""


def place_of(destination: Destination) -> tuple[str, str]:
    return destination.module_name, destination.parameter


def layout_of(destination: Destination) -> Layout | None:
    parameter = getattr(destination.module, destination.parameter, None)
    return None if parameter is None else Layout(tuple(parameter.shape), parameter.stride(), parameter.dtype)


def expert_of(part: _Placed) -> int:
    """Of a part of a worker's experts, the one that it belongs to."""
    return part.destination.offset // math.prod(part.layout.shape[1:]) if part.layout is not None else 0


def processes(parts: Sequence[_Placed]) -> bool:
    """Whether their module has a method that may bring its weights into another form."""
    return getattr(parts[0].destination.module, "quant_method", None) is not None


def may_reorder(parts: Sequence[_Placed]) -> bool:
    """Whether their module may bring its parameter into another form in place. One whose kernel has a copy does not."""
    return processes(parts) and parts[0].columns is None


def signed(number: int) -> int:
    """As int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


class Taken(NamedTuple):
    """What workers take of the tensors that are compared."""

    rows: Numbers
    """int64[parts, 5]: tensor and box, each once, in order."""
    of_worker: list[Numbers]
    """By worker, which of the rows each of its wants is, in their order."""


def parts_of(workers: Sequence[Wants], checked: Sequence[int]) -> Taken:
    """What the workers take of `checked` tensors. Those of other servers mostly take the same, and are looked at
    once."""
    distinct: dict[bytes, int] = {}
    blocks, which = [np.zeros((0, 5), np.int64)], []
    for numbers in map(numbers_of, workers):
        own = numbers[np.isin(numbers[:, 0], checked)]
        key = own.tobytes()
        if key not in distinct:
            distinct[key] = len(blocks)
            blocks.append(own)
        which.append(distinct[key])
    rows, inverse = np.unique(np.concatenate(blocks), axis=0, return_inverse=True)
    places = np.split(inverse.reshape(-1), np.cumsum([len(block) for block in blocks])[:-1])
    return Taken(rows, [places[block] for block in which])


def tensors_drawn(tensors: Sequence[Tensor], update: int, count: int) -> list[int]:
    """About `count` of the tensors, in their order; others at each update, until all have had theirs. Experts' tensors
    of one name in one layer count as one, whose experts take turns: they lie in one parameter, which is compared as a
    whole where its kernel has a layout of its own."""
    if count >= len(tensors):
        return list(range(len(tensors)))
    kinds: dict[str, list[int]] = {}
    for number, tensor in enumerate(tensors):
        begin, rest = tensor.layer, tensor.name[len(tensor.layer) :]
        kinds.setdefault(begin + NUMBER.sub(".*", rest), []).append(number)
    order = list(kinds.values())
    random.Random(0).shuffle(order)
    turns = [divmod(update * count + place, len(order)) for place in range(count)]
    return sorted({order[kind][turn % len(order[kind])] for turn, kind in turns})


def own_fingerprints(rows: Numbers, source: ShardedSource, specs: Sequence[ParamSpec], rank: int) -> torch.Tensor:
    """int64[parts], on the source's device: of what is in each of Taken.rows, this rank's share, while the source is
    `reading`. Of ranks that hold the same the lowest has it, so that the sum over ranks is the part's fingerprint."""
    held: dict[int, list[Box]] = {}
    for tensor, box, ranks in source.shards:
        if min(ranks) == rank:
            held.setdefault(tensor, []).append(box)
    zero = torch.zeros((), dtype=torch.int64, device=source.device)
    found = []
    for tensor, *sides in rows.tolist():
        shares = [common for box in held.get(tensor, ()) if (common := box.meet(Box(*sides))) is not None]
        found.append(
            sum((fingerprint(source.read(tensor, share).to(specs[tensor][1]), share) for share in shares), zero)
        )
    return torch.stack(found) if found else zero.reshape(1)[:0]


def compare(
    reports: Sequence[torch.Tensor],
    expected: Numbers,
    parts: Taken,
    specs: Sequence[ParamSpec],
    where: Sequence[str],
) -> None:
    """`reports` by worker, as `WorkerCheck.report` has them; `expected` by Taken.rows; `where` says which worker it is.
    EngineError, naming the tensors, if a worker holds other numbers than the trainer, or says nothing of a part."""
    wrong = []
    for report, own, name in zip(reports, parts.of_worker, where, strict=True):
        if len(report) != len(own):
            raise EngineError(f"weight sync: {name} answered for {len(report)} parts of tensors, and takes {len(own)}")
        known, found = report.numpy().T
        bad = (known != 0) & ((known != 1) | (found != expected[own]))
        for tensor, top, bottom, left, right in parts.rows[own[bad]].tolist():
            wrong.append(f"{specs[tensor][0]}, rows {top} to {bottom}, columns {left} to {right}, on {name}")
    if wrong:
        more = f"; and {len(wrong) - FAULTS_SHOWN} more" if len(wrong) > FAULTS_SHOWN else ""
        raise EngineError(
            "weight sync: a server holds other numbers than the trainer after a push: "
            f"{'; '.join(wrong[:FAULTS_SHOWN])}{more}. It would not sample from the policy. If it stays so, report it "
            "with this line; rollout.check_tensors 0 leaves the comparison out"
        )
