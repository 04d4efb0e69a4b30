"""After a push: do the servers hold what the trainer holds? vLLM is not imported.

Fingerprints (weights/fingerprint.py) of the parts that each worker took, read back from its parameters, against those
of the same parts by the trainer's ranks.

A worker reads what its model runs with wherever that still has the checkpoint's layout. Some kernels want another
(packed matrices on CPUs, shuffled experts on GPUs): those parameters are read when all their parts have been placed,
before they are processed. Which they are is found at the first update (later for those whose numbers were all the same
then), and only among modules that have a method to process weights: norms, router biases and the like are always read
as the model has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_r1.engines.source import ShardedSource
from megatron_r1.engines.vllm.destination import Destination
from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.takes import Wants, numbers_of
from megatron_r1.weights.fingerprint import fingerprint
from megatron_r1.weights.wire import ParamSpec

FAULTS_SHOWN = 5


@dataclass
class Layouts:
    """What is known of parameters (module name, name) whose module processes weights, from one update to the next:
    `kept` run in the checkpoint's layout, `repacked` do not."""

    kept: set[tuple[str, str]] = field(default_factory=set)
    repacked: set[tuple[str, str]] = field(default_factory=set)


class WorkerCheck:
    """A worker's part of one update: call `placed` before a layer is processed, `report` when all are."""

    def __init__(
        self,
        destinations: Sequence[Destination],
        specs: Sequence[ParamSpec],
        layers: Sequence[str],
        checked: Collection[int],
        layouts: Layouts,
    ) -> None:
        """`specs`, `layers`: by tensor. `checked`: tensors."""
        self.destinations, self.specs, self.layouts = destinations, specs, layouts
        self.by_layer: dict[str, list[int]] = {}
        for number, destination in enumerate(destinations):
            if destination.tensor in checked:
                self.by_layer.setdefault(layers[destination.tensor], []).append(number)
        self.loaded: dict[tuple[str, str], list[_Placed]] = {}
        """By parameter."""

    def placed(self, layer: str) -> None:
        """The parameters of the layer are as the checkpoint has them, and whole."""
        for number in self.by_layer.get(layer, ()):
            destination = self.destinations[number]
            place = (destination.module_name, destination.parameter)
            values, (_, dtype, _) = destination.view(destination.box), self.specs[destination.tensor]
            if values.dtype != dtype and values.dtype.itemsize <= dtype.itemsize:
                continue  # it is rounded on its way
            known = place in self.layouts.kept or place in self.layouts.repacked
            varied = not known and bool((values != values[:1, :1]).any())
            found = self.fingerprint_of(destination)
            self.loaded.setdefault(place, []).append(_Placed(destination, found, layout_of(destination), varied))

    def report(self) -> torch.Tensor:
        """int64[parts, 6]: tensor, box, fingerprint."""
        rows = []
        for place, parts in self.loaded.items():
            before = [int(part.fingerprint) for part in parts]
            served = self.served(place, parts, before)
            rows += [
                (part.destination.tensor, *part.destination.box, number)
                for part, number in zip(parts, served, strict=True)
            ]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)

    def served(self, place: tuple[str, str], parts: Sequence[_Placed], before: list[int]) -> list[int]:
        """Fingerprints of a parameter's parts as the model runs with them, or, where its kernel has another layout, as
        they were placed. Numbers that are all the same do not tell which it is."""
        kept, repacked = self.layouts.kept, self.layouts.repacked
        if place in repacked:
            return before
        if any(layout_of(part.destination) != part.layout for part in parts):
            repacked.add(place)
            return before
        served = [int(self.fingerprint_of(part.destination)) for part in parts]
        processes = getattr(parts[0].destination.module, "quant_method", None) is not None
        if processes and place not in kept:
            if served != before:
                repacked.add(place)
                return before
            if any(part.varied for part in parts):
                kept.add(place)
        return served

    def fingerprint_of(self, destination: Destination) -> torch.Tensor:
        """In the wire's dtype: a parameter may have a wider one."""
        _, dtype, _ = self.specs[destination.tensor]
        return fingerprint(destination.view(destination.box).to(dtype), destination.box)


@dataclass(frozen=True, slots=True)
class _Placed:
    destination: Destination
    fingerprint: torch.Tensor
    layout: tuple
    varied: bool
    """The part has different numbers."""


def layout_of(destination: Destination) -> tuple:
    parameter = getattr(destination.module, destination.parameter, None)
    return () if parameter is None else (tuple(parameter.shape), parameter.stride(), parameter.dtype)


def parts_wanted(servers: Sequence[Sequence[Wants]], checked: Sequence[int]) -> list[tuple[int, Box]]:
    """(tensor, box) of everything of `checked` tensors that some worker takes, each once, in order."""
    rows = [np.zeros((0, 5), np.int64)]
    for numbers in (numbers_of(wants) for workers in servers for wants in workers):
        rows.append(np.unique(numbers[np.isin(numbers[:, 0], checked)], axis=0))
    return [(tensor, Box(*box)) for tensor, *box in np.unique(np.concatenate(rows), axis=0).tolist()]


def own_fingerprints(
    wanted: Iterable[tuple[int, Box]], source: ShardedSource, specs: Sequence[ParamSpec], rank: int
) -> torch.Tensor:
    """int64[parts], on the source's device: of what is in each part, this rank's share, while the source is `reading`.
    Of ranks that hold the same the lowest has it, so that the sum over ranks is the part's fingerprint."""
    held: dict[int, list[Box]] = {}
    for tensor, box, ranks in source.shards:
        if min(ranks) == rank:
            held.setdefault(tensor, []).append(box)
    zero = torch.zeros((), dtype=torch.int64, device=source.device)
    found = []
    for tensor, part in wanted:
        shares = [common for box in held.get(tensor, ()) if (common := box.meet(part)) is not None]
        found.append(
            sum((fingerprint(source.read(tensor, share).to(specs[tensor][1]), share) for share in shares), zero)
        )
    return torch.stack(found) if found else zero.reshape(1)[:0]


def compare(
    reports: Sequence[torch.Tensor],
    expected: Mapping[tuple[int, Box], int],
    specs: Sequence[ParamSpec],
    where: Sequence[str],
) -> None:
    """`reports` by worker, as `WorkerCheck.report` has them; `where` says which worker that is. EngineError, naming the
    tensors, if a worker holds other numbers than the trainer."""
    wrong = []
    for report, name in zip(reports, where, strict=True):
        for tensor, top, bottom, left, right, found in report.tolist():
            if expected[tensor, Box(top, bottom, left, right)] != found:
                wrong.append(f"{specs[tensor][0]}, rows {top} to {bottom}, columns {left} to {right}, on {name}")
    if wrong:
        more = f"; and {len(wrong) - FAULTS_SHOWN} more" if len(wrong) > FAULTS_SHOWN else ""
        raise EngineError(
            "weight sync: a server holds other numbers than the trainer after a push: "
            f"{'; '.join(wrong[:FAULTS_SHOWN])}{more}. It would not sample from the policy. If it stays so, report it "
            "with this line; rollout.check_tensors 0 leaves the comparison out"
        )
