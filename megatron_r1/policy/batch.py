"""A PackedMicrobatch as the tensors that one rank feeds to its model chunk.

Context-parallel ranks take their two chunks of each segment here; nothing later knows about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_r1.model.attention import context_parallel_positions
from megatron_r1.model.routing import RoutedSeqParams
from megatron_r1.types import PackedMicrobatch


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """This rank's share of a packed row: S tokens. i64[1, S] ids, f32[1, S] numbers, bool[1, S] mask.

    `positions` i64[S] says where in the whole row each of them stands.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    token_weight: torch.Tensor
    advantages: torch.Tensor
    behaviour_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    teacher_logprobs: torch.Tensor
    packed: PackedSeqParams
    positions: torch.Tensor

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        """values [1, S] -> at each token the mean over its sequence's trained tokens, 0 where there are none; no
        gradient. A collective over context-parallel ranks, which hold other parts of the same sequences."""
        sums, counts = self._over_sequences(values)
        return (sums / counts.clamp(min=1.0)).to(values.dtype)[None]

    def sequence_sum(self, values: torch.Tensor) -> torch.Tensor:
        """As sequence_mean, with the sum."""
        return self._over_sequences(values)[0].to(values.dtype)[None]

    @torch.no_grad()
    def _over_sequences(self, values: torch.Tensor) -> torch.Tensor:
        """f64[2, S]: at each token the sum over its sequence's trained tokens, and their number."""
        edges = self.packed.cu_seqlens_q
        of_token = torch.searchsorted(edges, self.positions.to(edges.device), right=True) - 1
        trained = self.loss_mask[0]
        totals = values.new_zeros((2, len(edges)), dtype=torch.float64)
        totals[0].index_add_(0, of_token, values[0].double().where(trained, 0.0))
        totals[1].index_add_(0, of_token, trained.double())
        if parallel_state.get_context_parallel_world_size() > 1:
            dist.all_reduce(totals, group=parallel_state.get_context_parallel_group())
        return totals[:, of_token]


def to_device(row: PackedMicrobatch, device: torch.device, *, replay: bool | None = None) -> DeviceBatch:
    """`replay`: what is done with the row's routes (model/routing.py); None: they stay behind. Raises ValueError if a
    segment does not divide into 2 * context-parallel chunks."""
    size = parallel_state.get_context_parallel_world_size()
    lengths = np.diff(row.cu_seqlens).tolist()
    if size > 1:
        positions = context_parallel_positions(lengths, size, parallel_state.get_context_parallel_rank())
    else:
        positions = torch.arange(row.num_tokens)

    def take(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return (tensor[:, positions] if size > 1 else tensor).to(device, non_blocking=True)

    cu_seqlens = torch.from_numpy(row.cu_seqlens).to(device)
    routes = None
    if replay is not None and row.routes is not None:
        routes = torch.from_numpy(row.routes[positions.numpy()] if size > 1 else row.routes)
        routes = routes.to(device, non_blocking=True)
    packed = RoutedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=row.max_seqlen,
        max_seqlen_kv=row.max_seqlen,
        routes=routes,
        replay=bool(replay),
    )
    return DeviceBatch(
        token_ids=take(row.token_ids),
        labels=take(row.labels),
        position_ids=take(row.position_ids),
        loss_mask=take(row.loss_mask),
        token_weight=take(row.token_weight),
        advantages=take(row.advantages),
        behaviour_logprobs=take(row.behaviour_logprobs),
        old_logprobs=take(row.old_logprobs),
        reference_logprobs=take(row.reference_logprobs),
        teacher_logprobs=take(row.teacher_logprobs),
        packed=packed,
        positions=positions,
    )
