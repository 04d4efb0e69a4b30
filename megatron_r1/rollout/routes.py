"""The experts that an engine chose for each token, as the trainer needs them: looked at before anything is trained.

An engine returns them for every token that it has read: the prompt's and the completion's but for the last one, which
was sampled and never read. Left out: how the trainer replays them (model/routing.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import RoutesError
from megatron_r1.types import Completion

REMEDY = "the servers must serve the model that is trained; set rollout.routes to off to train without them"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteForm:
    """What the routes of a model look like. `num_layers`: of the model; `sparse`: which of them have experts (from 0,
    multi-token-prediction layers left out); `num_experts` in each, `top_k` of them for a token."""

    num_layers: int
    sparse: tuple[int, ...]
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, shape: ModelShape) -> RouteForm:
        """ValueError for a model without experts."""
        if shape.moe is None:
            raise ValueError("a dense model has no routes")
        sparse = tuple(layer for layer in range(shape.num_layers) if shape.is_moe_layer(layer))
        return cls(num_layers=shape.num_layers, sparse=sparse, num_experts=shape.moe.num_experts, top_k=shape.moe.top_k)

    @property
    def dtype(self) -> np.dtype:
        """One byte an expert where that is enough."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)

    @property
    def bytes_per_token(self) -> int:
        return len(self.sparse) * self.top_k * self.dtype.itemsize

    def taken(self, completion: Completion, prompt_tokens: int) -> Completion:
        """The completion with the routes [P + T - 1, sparse layers, top_k] out of the engine's, [P + T - 1, num_layers,
        top_k]. RoutesError, with the remedy, if they are missing or cannot be those of its tokens in this model."""
        found, tokens = completion.routes, prompt_tokens + len(completion.token_ids) - 1
        if found is None:
            raise RoutesError(f"rollout.routes: a completion came without the experts of its tokens; {REMEDY}")
        expected = (tokens, self.num_layers, self.top_k)
        if found.shape != expected:
            raise RoutesError(
                f"rollout.routes: experts came for {_form(found.shape)}; a completion of {len(completion.token_ids)} "
                f"tokens after a prompt of {prompt_tokens} has {_form(expected)}; {REMEDY}"
            )
        routes = found[:, list(self.sparse)]
        if routes.size and int(routes.max()) >= self.num_experts:
            raise RoutesError(
                f"rollout.routes: a token went to expert {int(routes.max())}; the model has {self.num_experts} experts "
                f"a layer, numbered from 0; {REMEDY}"
            )
        self._refuse_unset(routes)
        return dataclasses.replace(completion, routes=np.ascontiguousarray(routes, self.dtype))

    def _refuse_unset(self, routes: np.ndarray) -> None:
        """A buffer that nobody filled is all zeros, and experts of a token are never the same twice."""
        if self.top_k > 1:
            ordered = np.sort(routes, axis=-1)
            twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
            if not twice.any():
                return
            place, layer = np.argwhere(twice)[0]
            chosen = ", ".join(map(str, routes[place, layer]))
            where = f"token {place} of {len(routes)} went to experts {chosen} in layer {self.sparse[layer]}"
            share = f"{twice.mean():.0%} of all"
        else:
            if routes.any() or not routes.size or self.num_experts == 1:
                return
            where, share = f"all {len(routes)} tokens went to expert 0 in every layer", "a buffer that was not filled"
        raise RoutesError(f"rollout.routes: {where} ({share}), which no router chooses; {REMEDY}")


def _form(shape: tuple[int, ...]) -> str:
    if len(shape) != 3:
        return f"an array of {len(shape)} dimensions"
    tokens, layers, chosen = shape
    return f"{tokens} tokens, {layers} layers and {chosen} experts a token"
