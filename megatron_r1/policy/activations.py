"""Compare what the policy's modules compute with a recording of another engine's, on the rank that computes it.

Hooks on Megatron's modules see the outputs under the trainer's own layout: each rank has its own layers, and of a
sequence its own tokens, and compares them with those rows of the recording. Only norms of differences leave a rank.

With `feed` every module is given the recorded input in place of its own, so that a difference shows in the module that
makes it and in none behind it. Without, the model runs as it trains, and differences add up from layer to layer.
"""

# Megatron's and torch's annotations are narrower than what they take.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1.activations import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    GATE,
    HEAD,
    INPUT,
    INPUT_NORM,
    MIDDLE,
    MIDDLE_NORM,
    MLP,
    NORM,
    NORM_INPUT,
    layer_part,
)
from megatron_r1.model.policy_model import PolicyModel
from megatron_r1.policy.batch import to_device
from megatron_r1.policy.policy import Policy
from megatron_r1.types import PackedMicrobatch

TIE = 1e-6
"""Router logits that differ by less than this part are equal: which of two such experts is chosen means nothing."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one module's output, by token. `positions` i64[n] in the prompt; `error` f64[n], the norm of the difference;
    `size` f64[n], the norm of the recorded output. Of the head's logits: the largest difference, and the largest logit.
    Of the chosen experts: how many are others (with `feed`, of logits that are not equal), and how many there are."""

    positions: np.ndarray
    error: np.ndarray
    size: np.ndarray


def compare_activations(
    policy: Policy, rows: Sequence[PackedMicrobatch], recording: Mapping[str, torch.Tensor], *, feed: bool
) -> tuple[dict[str, Difference], np.ndarray]:
    """(differences by the recording's names, logprobs f32[S] of the row's labels) of one prompt, the only sequence of
    each of `rows`. A collective; differences are rank 0's, empty on the others. With `feed` the output of experts is
    compared for the tokens that have the same ones."""
    local = to_device(rows[0], policy.device).positions.to(policy.device)
    own: dict[str, Difference] = {}
    watches = []
    with ExitStack() as hooks:
        for chunk in policy.chunks:
            watches.append(_Watch(chunk.module, local, recording, own, feed=feed))
            hooks.callback(watches[-1].close)
        logprobs = policy.logprobs(rows)[0]
        for watch in watches:
            watch.compare_logits()
    return _together(own), logprobs


class _Watch:
    """Hooks on one model chunk of this rank, which write to `found`."""

    def __init__(
        self,
        model: PolicyModel,
        positions: torch.Tensor,
        recording: Mapping[str, torch.Tensor],
        found: dict[str, Difference],
        *,
        feed: bool,
    ) -> None:
        """`positions` i64[S]: where in the row the tokens of this context-parallel rank are."""
        self.model, self.recording, self.found, self.feed = model, recording, found, feed
        self.num_tokens = len(recording[EMBEDDING])
        self.head_positions = positions
        self.sequence_parallel = model.config.sequence_parallel
        if self.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            positions = positions.chunk(group.size())[group.rank()]
        self.inside = positions < self.num_tokens
        self.positions = positions[self.inside]
        self.same_experts: dict[str, torch.Tensor] = {}
        self.hidden: torch.Tensor | None = None
        self.undo: list[Callable[[], object]] = []
        if model.pre_process:
            self.after(model.embedding, EMBEDDING, feed=False)
        for layer in model.decoder.layers:
            self.watch_layer(layer)
        norm = model.decoder.final_layernorm
        if norm is not None:
            self.before(norm, NORM_INPUT)
            self.after(norm, NORM, feed=feed)
            self.undo.append(norm.register_forward_hook(self.keep_hidden).remove)

    def watch_layer(self, layer: TransformerLayer) -> None:
        def name(part: str) -> str:
            return layer_part(layer.layer_number - 1, part)

        self.before(layer, name(INPUT))
        self.before(layer.pre_mlp_layernorm, name(MIDDLE))
        for norm, part in ((layer.input_layernorm, INPUT_NORM), (layer.pre_mlp_layernorm, MIDDLE_NORM)):
            if not isinstance(norm, IdentityOp):  # Transformer Engine has it in the linear behind it
                self.after(norm, name(part), feed=self.feed)
        self.after(layer.self_attention, name(ATTENTION), feed=False)
        if hasattr(layer.mlp, "router"):
            self.watch_router(layer.mlp.router, name(GATE), name(EXPERTS), name(MLP))
        self.after(layer.mlp, name(MLP), feed=False)

    def before(self, module: torch.nn.Module, name: str) -> None:
        """Compare what the module is given, and put the recorded rows in its place if they are fed."""

        def see(_: torch.nn.Module, positional: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if "hidden_states" in named:
                return positional, named | {"hidden_states": self.seen(name, named["hidden_states"], feed=self.feed)}
            return (self.seen(name, positional[0], feed=self.feed), *positional[1:]), named

        self.undo.append(module.register_forward_pre_hook(see, with_kwargs=True).remove)

    def after(self, module: torch.nn.Module, name: str, *, feed: bool) -> None:
        """Compare what the module gives (the bias that some give apart is added)."""

        def see(_: torch.nn.Module, __: tuple, output: Any) -> torch.Tensor | None:
            values, bias = output if isinstance(output, tuple) else (output, None)
            replaced = self.seen(name, values if bias is None else values + bias, feed=feed)
            return replaced if feed else None

        self.undo.append(module.register_forward_hook(see).remove)

    def watch_router(self, router: torch.nn.Module, gate: str, experts: str, mlp: str) -> None:
        """Compare its logits, and which experts it chooses: of the recorded logits, if they are fed."""
        gating = router.gating

        def see_logits(*given: Any) -> torch.Tensor:
            return self.seen(gate, gating(*given), feed=self.feed)

        def see_experts(_: torch.nn.Module, __: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            own = output[1].flatten(0, -2)[self.inside].bool()
            chosen = self.rows(experts).long()
            theirs = torch.zeros_like(own).scatter(1, chosen, True)
            others = (theirs & ~own).sum(-1)
            self.same_experts[mlp] = others == 0
            if self.feed:
                others = others * ~_tied(self.rows(gate), own & ~theirs, theirs & ~own)
            self.put(experts, others.double(), torch.full_like(others, chosen.shape[1]).double())

        router.gating = see_logits
        self.undo.append(lambda: delattr(router, "gating"))
        if experts in self.recording:
            self.undo.append(router.register_forward_hook(see_experts).remove)

    def seen(self, name: str, values: torch.Tensor, *, feed: bool) -> torch.Tensor:
        """Compare values [s, 1, N] of this rank's tokens; the same with the recorded rows in them, if `feed`."""
        flat = values.flatten(0, -2)
        recorded = self.rows(name)
        error, size = (flat[self.inside].float() - recorded.float()).norm(dim=-1), recorded.float().norm(dim=-1)
        same = self.same_experts.get(name) if self.feed else None
        self.put(name, error.double(), size.double(), same)
        if not feed:
            return values
        filled = flat.clone()
        filled[self.inside] = recorded.to(filled.dtype)
        return filled.view_as(values)

    def rows(self, name: str) -> torch.Tensor:
        """Those of the recording that this rank's tokens have."""
        rows = self.recording[name]
        return rows[self.positions.to(rows.device)].to(self.positions.device)

    def put(self, name: str, error: torch.Tensor, size: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        arrays = [self.positions, error, size]
        self.found[name] = Difference(*((each if kept is None else each[kept]).cpu().numpy() for each in arrays))

    def keep_hidden(self, _: torch.nn.Module, __: tuple, output: torch.Tensor) -> None:
        self.hidden = output

    @torch.no_grad()
    def compare_logits(self) -> None:
        """Of the recorded positions, on the last pipeline stage, by the columns of the vocabulary that are here. A
        collective of tensor-parallel ranks."""
        if self.hidden is None:
            return
        group = parallel_state.get_tensor_model_parallel_group()
        hidden = self.hidden
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        recorded = self.recording[HEAD]
        here = self.head_positions < len(recorded)
        weight = self.model._head_weight_or_none()
        weight = self.model.output_layer.weight if weight is None else weight
        logits = F.linear(hidden.squeeze(1)[here], weight).float()
        start = group.rank() * weight.shape[0]
        positions = self.head_positions[here]
        theirs = recorded[positions.to(recorded.device)].to(logits.device).float()
        columns = theirs[:, start : start + weight.shape[0]]
        error = (logits[:, : columns.shape[1]] - columns).abs().amax(-1)
        arrays = (positions, error.double(), theirs.abs().amax(-1).double())
        self.found[HEAD] = Difference(*(each.cpu().numpy() for each in arrays))

    def close(self) -> None:
        """Take the hooks off."""
        while self.undo:
            self.undo.pop()()


def _tied(logits_TE: torch.Tensor, one_TE: torch.Tensor, other_TE: torch.Tensor) -> torch.Tensor:
    """bool[T]: whether the two choices of experts have equal logits, one by one."""
    a, b = (
        logits_TE.float().masked_fill(~choice, float("-inf")).sort(dim=-1, descending=True).values
        for choice in (one_TE, other_TE)
    )
    return ((a == b) | ((a - b).abs() <= TIE * (1 + a.abs()))).all(dim=-1)


def _together(own: Mapping[str, Difference]) -> dict[str, Difference]:
    """All ranks' differences on rank 0, by position; of ranks that have the same position the largest error, since
    copies of a module are equal and parts of the vocabulary are one row."""
    world = dist.get_world_size()
    everyone: list[Any] | None = [None] * world if dist.get_rank() == 0 else None
    dist.gather_object(dict(own), everyone, dst=0)
    joined: dict[str, Difference] = {}
    for name in sorted({name for found in everyone or () for name in found}):
        parts = [found[name] for found in everyone or () if name in found]
        positions = np.unique(np.concatenate([part.positions for part in parts]))
        error, size = np.zeros(len(positions)), np.zeros(len(positions))
        for part in parts:
            places = np.searchsorted(positions, part.positions)
            error[places] = np.maximum(error[places], part.error)
            size[places] = np.maximum(size[places], part.size)
        joined[name] = Difference(positions, error, size)
    return joined
