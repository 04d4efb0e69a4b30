"""What kernels compute with, where that is a form of the weights that cannot be read. vLLM is not imported.

On CPUs vLLM packs a matrix when it was loaded, calls what has the copy `cpu_linear`, and empties the parameter, or, of
a head, keeps it beside. A row with a single 1 times the matrix is one of its columns, to the bit: so the kernel is
asked for a few. Experts are packed in place, in an order that is the kernel's own: each is asked for what it makes of
a row of noise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_r1.engines.vllm.destination import Destination

ASKED = 4
"""Columns of a part."""
ROUNDING = 0.1
"""The most that an expert's answer differs by from what it should be, as a share of its length. In bf16 it is 0.01; of
weights in a wrong order about 1."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Some columns of a part of a matrix, as they were before the matrix was packed."""

    modules: Sequence[torch.nn.Module]
    """The matrix's, and those that share it: a tied head has a copy of its own."""
    top: int
    """The part's first row in the matrix."""
    left: int
    """Its first column there."""
    width: int
    """Columns of the matrix."""
    numbers: list[int]
    """Of the part's columns."""
    placed: torch.Tensor
    """[rows, numbers]."""
    spoiled: torch.Tensor
    """bool [rows, 1]: the matrix has a number there that is none, in bf16 or at all, and so has every answer."""

    def compared(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """For each kernel, of each column its number in the part, and [rows, 1] each: what was placed, and what the
        kernel has."""
        ones = torch.zeros(len(self.numbers), self.width, dtype=self.placed.dtype)
        ones[torch.arange(len(self.numbers)), torch.tensor(self.numbers) + self.left] = 1
        rows = slice(self.top, self.top + len(self.placed))
        for module in self.modules:
            kernel: Any = module.cpu_linear
            found = kernel(ones, getattr(module, "weight", None), None)[:, rows].T.to(self.placed.dtype)
            found = torch.where(as_good(found, self.placed) | self.spoiled & ~found.isfinite(), self.placed, found)
            for place, number in enumerate(self.numbers):
                yield number, self.placed[:, place : place + 1], found[:, place : place + 1]


def as_good(found: torch.Tensor, placed: torch.Tensor) -> torch.Tensor:
    """bool, elementwise: a kernel with these numbers has what was placed. It may round them to bf16 or take the tiniest
    for 0."""
    tiny = torch.finfo(placed.dtype).tiny
    rounded = placed.bfloat16().to(placed.dtype)
    return (found == placed) | (found == rounded) | ((found == 0) & (placed.abs() < tiny))


def columns_to_ask_for(
    destination: Destination, values: torch.Tensor, draw: random.Random, sharers: Sequence[torch.nn.Module]
) -> Columns | None:
    """Some of the part's numbers, [rows, columns], while its matrix is as the checkpoint has it. None where the model
    runs with the parameter itself. `sharers`: other modules that run with the same matrix."""
    parameter = getattr(destination.module, destination.parameter)
    modules = [each for each in (destination.module, *sharers) if has_a_copy(each)]
    if not modules or destination.parameter != "weight" or parameter.dim() != 2 or parameter.dtype.itemsize < 2:
        return None
    width = parameter.shape[1]
    if (destination.row_stride, destination.column_stride) != (width, 1) or not values.numel():
        return None
    top, left = divmod(destination.offset, width)
    numbers = sorted(draw.sample(range(values.shape[1]), min(ASKED, values.shape[1])))
    spoiled = ~parameter[top : top + len(values)].bfloat16().isfinite().all(1, keepdim=True)
    return Columns(modules, top, left, width, numbers, values[:, numbers].clone(), spoiled)


def has_a_copy(module: torch.nn.Module) -> bool:
    """Of its weight, in a form of its kernel's."""
    return hasattr(module, "cpu_linear") and not getattr(module, "_cpu_skip_gemm_dispatch", False)


def sharers_of(model: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
    """By module, the others that have the same weight."""
    holders: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        holders.setdefault(id(module._parameters.get("weight")), []).append(module)
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        others = [other for other in holders[id(weight)] if other is not module] if weight is not None else []
        if others:
            found[name] = others
    return found


def noise(module: Any) -> torch.Tensor:
    """[1, hidden], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, module.w2_weight.shape[1], generator=generator).to(module.w2_weight.dtype)


@dataclass(frozen=True, slots=True)
class Answers:
    """What some of a worker's experts should make of `noise`."""

    experts: list[int]
    total: int
    """Experts of the module."""
    expected: torch.Tensor
    """f32 [experts, hidden]."""


def answers(module: Any, experts: list[int]) -> Answers | None:
    """By the module's weights as the checkpoint has them. None for one that is no CPU's layer of gated experts without
    biases, all on this worker."""
    gate_up, down = (getattr(module, name, None) for name in ("w13_weight", "w2_weight"))
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    if gate_up is None or down is None or kernel is None or down.device.type != "cpu" or gate_up.dim() != 3:
        return None
    if module.activation.value != "silu" or getattr(module, "w13_bias", None) is not None:
        return None
    if module.expert_map is not None or module.apply_router_weight_on_input:
        return None
    row = noise(module)[0].float()
    found = []
    for expert in experts:
        gate, up = (gate_up[expert].float() @ row).chunk(2)
        found.append(down[expert].float() @ (torch.nn.functional.silu(gate) * up))
    return Answers(experts, len(down), torch.stack(found))


def wrong_experts(module: Any, asked: Answers) -> set[int]:
    """Experts that answer otherwise than they should, but those whose weights make that no number."""
    count, expected = len(asked.experts), asked.expected
    found = module.quant_method.moe_kernel.apply(
        hidden_states=noise(module).repeat(count, 1),
        w1=module.w13_weight,
        w2=module.w2_weight,
        topk_weights=torch.ones(count, 1),
        topk_ids=torch.tensor(asked.experts, dtype=torch.int32).view(count, 1),
        activation=module.activation,
        global_num_experts=asked.total,
        expert_map=None,
        apply_router_weight_on_input=False,
    )
    as_expected = (found.float() - expected).norm(dim=1) <= ROUNDING * expected.norm(dim=1)  # not so if it is NaN
    wrong = ~as_expected & expected.isfinite().all(1)
    return {asked.experts[place] for place in wrong.nonzero().flatten().tolist()}
