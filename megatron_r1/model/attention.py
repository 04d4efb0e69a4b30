"""Core attention on torch's scaled_dot_product_attention, for machines without Transformer Engine.

Megatron's own unfused attention refuses MLA (key and value widths differ) and packed sequences. This one does both,
grouped-query attention, and context parallelism by gathering keys and values (each rank keeps its own queries).
Causal attention only; no dropout; no sliding window. On GPUs with Transformer Engine this file is not used.

Shapes: S sequence, B batch, T = packed tokens on this rank, N query heads, G key heads, K key width, V value width.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig


class SDPACoreAttention(torch.nn.Module):
    """Causal softmax(q k^T * scale) v, per packed segment."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError("attention_dropout must be 0 with the local spec")
        self.softmax_scale = softmax_scale
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.context_group = groups.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: object = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [S,B,N,K], key [S,B,G,K], value [S,B,G,V] -> [S,B,N*V]; or packed [T,N,K], ... -> [T,N*V]."""
        if packed_seq_params is None:
            return self._dense(query, key, value)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if self.context_group.size() > 1:
            return self._packed_context_parallel(query, key, value, lengths)
        if len(lengths) == 1:
            return self._attend(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)).squeeze(1).flatten(1)
        return self._packed(query, key, value, lengths)

    def _packed(
        self, q_TNK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """Segments of similar length share one batched call. Behind a shorter segment stands whatever follows it in
        the row: causal attention never looks there from inside the segment, and those outputs are dropped."""
        batches = _similar_lengths(lengths)
        outputs, kept = [], []
        for starts_B, lengths_B in batches:
            longest = max(lengths_B)
            offsets_LB = torch.arange(longest)[:, None] + torch.tensor(starts_B)[None, :]
            inside_LB = torch.arange(longest)[:, None] < torch.tensor(lengths_B)[None, :]
            index = offsets_LB.clamp(max=q_TNK.shape[0] - 1).to(q_TNK.device)
            out_LBNV = self._attend(q_TNK[index], k_TGK[index], v_TGV[index])
            outputs.append(out_LBNV[inside_LB])
            kept.append(offsets_LB[inside_LB])
        order = torch.cat(kept)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return torch.cat(outputs)[back.to(q_TNK.device)].flatten(1)

    def _attend(
        self, q_LBNK: torch.Tensor, k_MBGK: torch.Tensor, v_MBGV: torch.Tensor, mask_LM: torch.Tensor | None = None
    ) -> torch.Tensor:
        out_BNLV = F.scaled_dot_product_attention(
            q_LBNK.permute(1, 2, 0, 3),
            k_MBGK.permute(1, 2, 0, 3),
            v_MBGV.permute(1, 2, 0, 3),
            attn_mask=mask_LM,
            is_causal=mask_LM is None,
            scale=self.softmax_scale,
            enable_gqa=q_LBNK.shape[2] != k_MBGK.shape[2],
        )
        return out_BNLV.permute(2, 0, 1, 3)

    def _dense(self, q_SBNK: torch.Tensor, k_SBGK: torch.Tensor, v_SBGV: torch.Tensor) -> torch.Tensor:
        seq, batch = q_SBNK.shape[:2]
        if self.context_group.size() == 1:
            return self._attend(q_SBNK, k_SBGK, v_SBGV).flatten(2)
        total = seq * self.context_group.size()
        rows = [
            self._packed_context_parallel(q_SBNK[:, row], k_SBGK[:, row], v_SBGV[:, row], [total])
            for row in range(batch)
        ]
        return torch.stack(rows, dim=1)

    def _packed_context_parallel(
        self, q_TNK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """Each segment of global length L is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r
        (Megatron's load-balanced split), concatenated segment after segment."""
        size, rank = self.context_group.size(), self.context_group.rank()
        order = _gathered_order(lengths, size, q_TNK.device)
        k_all = gather_from_sequence_parallel_region(k_TGK, group=self.context_group)[order]
        v_all = gather_from_sequence_parallel_region(v_TGV, group=self.context_group)[order]
        outputs, local, start = [], 0, 0
        for length in lengths:
            chunk = length // (2 * size)
            for index in (rank, 2 * size - 1 - rank):
                end = (index + 1) * chunk
                query_positions = torch.arange(index * chunk, end, device=q_TNK.device)
                mask_LM = query_positions[:, None] >= torch.arange(end, device=q_TNK.device)[None, :]
                q_L1NK = q_TNK[local : local + chunk].unsqueeze(1)
                k_M1GK, v_M1GV = k_all[start : start + end].unsqueeze(1), v_all[start : start + end].unsqueeze(1)
                outputs.append(self._attend(q_L1NK, k_M1GK, v_M1GV, mask_LM).squeeze(1))
                local += chunk
            start += length
        return torch.cat(outputs).flatten(1)


def _similar_lengths(lengths: list[int]) -> list[tuple[list[int], list[int]]]:
    """Segments in groups whose longest is at most 1.25 times the shortest: (starts, lengths) of each group."""
    starts = [0, *itertools.accumulate(lengths)]
    groups: list[tuple[list[int], list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or lengths[index] > 1.25 * groups[-1][1][0]:
            groups.append(([], []))
        groups[-1][0].append(starts[index])
        groups[-1][1].append(lengths[index])
    return groups


def _gathered_order(lengths: list[int], size: int, device: torch.device) -> torch.Tensor:
    """Index that puts rank-major gathered tokens back into sequence order.

    Example, one segment of 4 tokens, cp 2: rank 0 holds tokens 0, 3 and rank 1 holds 1, 2; gathered [0, 3, 1, 2];
    the answer is [0, 2, 3, 1].
    """
    gathered = torch.cat([context_parallel_positions(lengths, size, rank) for rank in range(size)])
    order = torch.empty_like(gathered)
    order[gathered] = torch.arange(len(gathered))
    return order.to(device)


def context_parallel_positions(lengths: list[int], size: int, rank: int) -> torch.Tensor:
    """Global row positions i64[T / size] of the tokens that context-parallel rank `rank` holds."""
    parts, start = [], 0
    for length in lengths:
        chunk, rest = divmod(length, 2 * size)
        if rest:
            raise ValueError(f"a packed segment of {length} tokens does not divide into 2 * {size} chunks")
        for index in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
        start += length
    return torch.cat(parts)
