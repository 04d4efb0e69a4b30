"""From differences by token to a verdict by module: which one departs first, and which weights it has.

A module departs when, given the recorded input, its output is further from the recorded one than rounding explains.
Its number is that of its worst token: |own - recorded| / |recorded|, norms over the hidden size. |recorded| of a token
counts as at least the root mean square over all tokens: an output near 0 is a difference of larger numbers. Of logits
it is the largest difference beside the largest logit of the position. Of a router's choice it is the part of tokens
that have other experts, though the logits are the recorded ones.

The bounds follow from the precision. In bf16 a module rounds a few times whatever its width, since sums are in fp32: 4
units of the last place (2^-7). In fp32 the terms of those sums are rounded too: 256 units (2^-23). A smaller fault may
still stand out: what is beyond a quarter of the bound, and four times what the same module differs by in other layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_r1.activations import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    HEAD,
    INPUT_NORM,
    MIDDLE_NORM,
    MLP,
    NORM,
    PARTS,
    layer_part,
    split_part,
    weights_of,
)

BOUNDS = {"fp32": 256 * 2.0**-23, "bf16": 4 * 2.0**-7}
OTHER_EXPERTS = 0.01
"""Part of tokens that may be routed otherwise on equal logits, in any precision: scores that are nearly equal."""

STANDS_OUT = 4
FEWEST_LAYERS = 4
"""With fewer layers that have a module, none is usual."""

MOST_SUSPECTS = 8
"""Experts that are named; if more may be at fault, none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDifference:
    """Of one module, by token: f64[n] each, as policy.activations.Difference has them; `positions` i64[n]."""

    positions: np.ndarray
    error: np.ndarray
    size: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """By token, f64[n]; NaN and infinity stay."""
        least = np.sqrt(np.mean(self.size**2)) if len(self.size) else 0.0
        scale = np.maximum(self.size, least)
        return np.where(self.error == 0, 0.0, self.error / np.where(scale == 0, np.finfo(float).tiny, scale))

    @property
    def worst(self) -> float:
        """The largest of `relative`; NaN if there is one, 0 of no tokens."""
        return float(np.max(self.relative, initial=0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """What was found of one module. `difference`: see above; None if nothing could be compared. `drift`: the same
    number when each side runs on its own, so that earlier modules' differences are in it. `usual`: the median of the
    same module's differences in the other layers; None for what has no others. `experts`: those that alone explain the
    tokens that depart."""

    name: str
    difference: float | None
    position: int
    drift: float | None
    bound: float
    usual: float | None = None
    experts: tuple[int, ...] = ()

    @property
    def departs(self) -> bool:
        return self.difference is not None and not self.difference <= self.bound

    @property
    def stands_out(self) -> bool:
        """Whether it does not depart, and is far from usual."""
        if self.departs or self.difference is None or self.usual is None:
            return False
        return self.difference > self.bound / STANDS_OUT and self.difference > STANDS_OUT * self.usual


def in_order(names: Sequence[str], num_layers: int) -> list[str]:
    """Of `names`, the modules, in the order in which they run."""
    layers = [layer_part(layer, part) for layer in range(num_layers) for part in PARTS]
    return [name for name in (EMBEDDING, *layers, NORM, HEAD) if name in names]


def judge(
    fed: Mapping[str, TokenDifference],
    own: Mapping[str, TokenDifference],
    *,
    num_layers: int,
    dtype: str,
    chosen: Mapping[str, np.ndarray],
) -> list[Module]:
    """The modules in the order in which they run. `fed`: differences on recorded inputs; `own`: on each side's own.
    `chosen` has the recorded experts, i32[T, K], of the layers that have some, by EXPERTS' names."""
    found = [_module(name, fed[name], own.get(name), dtype, chosen) for name in in_order(list(fed), num_layers)]
    return [replace(module, usual=_usual(module, found)) for module in found]


def _usual(module: Module, modules: Sequence[Module]) -> float | None:
    layer = split_part(module.name)
    if layer is None or layer[1] == EXPERTS:
        return None
    alike = [each for each in modules if (other := split_part(each.name)) is not None and other[1] == layer[1]]
    others = [each.difference for each in alike if each is not module and each.difference is not None]
    return float(np.median(others)) if len(others) + 1 >= FEWEST_LAYERS else None


def _module(
    name: str,
    fed: TokenDifference,
    own: TokenDifference | None,
    dtype: str,
    chosen: Mapping[str, np.ndarray],
) -> Module:
    layer = split_part(name)
    if layer is not None and layer[1] == EXPERTS:
        share = float(np.mean(fed.error > 0))
        drift = None if own is None else float(np.mean(own.error > 0))
        first = int(fed.positions[fed.error > 0][0]) if share else 0
        return Module(name=name, difference=share, position=first, drift=drift, bound=OTHER_EXPERTS)
    relative, bound = fed.relative, BOUNDS[dtype]
    if not len(relative):
        return Module(name=name, difference=None, position=0, drift=None if own is None else own.worst, bound=bound)
    worst = int(np.argmax(np.where(np.isnan(relative), np.inf, relative)))
    experts: tuple[int, ...] = ()
    if layer is not None and layer[1] == MLP and (routes := chosen.get(layer_part(layer[0], EXPERTS))) is not None:
        experts = suspects(~(relative <= bound), routes[fed.positions])
    return Module(
        name=name,
        difference=float(relative[worst]),
        position=int(fed.positions[worst]),
        drift=None if own is None else own.worst,
        bound=bound,
        experts=experts,
    )


def suspects(departs: np.ndarray, chosen: np.ndarray) -> tuple[int, ...]:
    """The experts that departing tokens have and no other token has, if every departing token has one of them and they
    are few; none if all tokens depart. `departs` bool[n], `chosen` i32[n, K]: the tokens' experts."""
    found = np.setdiff1d(chosen[departs], chosen[~departs])
    explained = np.isin(chosen[departs], found).any(axis=1).all()
    named = 0 < len(found) <= MOST_SUSPECTS and explained and not departs.all()
    return tuple(int(expert) for expert in found) if named else ()


def weights_behind(module: Module, modules: Sequence[Module], hf_names: Sequence[str]) -> list[str]:
    """The Hugging Face tensors of the module: of its suspected experts alone, where there are some; with the norm
    before it, where the trainer has that inside the module."""
    if module.name == HEAD and not weights_of(HEAD, hf_names):
        return weights_of(EMBEDDING, hf_names)
    found, layer = weights_of(module.name, hf_names), split_part(module.name)
    if module.experts:
        return [name for name in found if any(f".experts.{expert}." in name for expert in module.experts)]
    before = {ATTENTION: INPUT_NORM, MLP: MIDDLE_NORM}.get(layer[1]) if layer else None
    if layer and before and (norm := layer_part(layer[0], before)) not in {each.name for each in modules}:
        found = weights_of(norm, hf_names) + found
    return found
