"""Parameter counts of a ModelShape, by where they live: sums over the weight table."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.tensors import numbers_of_layer
from megatron_r1.weights.table import embedding_entry, head_entry, mtp_entries


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Numbers of weights: `routed` in routed experts, `dense` in everything else (router biases included), `mtp` in
    multi-token-prediction layers beyond their shared embedding and head, `active` used by one token (without MTP)."""

    dense: int
    routed: int
    mtp: int
    active: int

    @property
    def total(self) -> int:
        """Without MTP, as model cards count."""
        return self.dense + self.routed


def count_parameters(shape: ModelShape) -> ParameterCount:
    head = head_entry(shape)
    ends = embedding_entry(shape).size + (head.size if head is not None else 0) + shape.hidden_size  # the last norm
    dense, routed = ends, 0
    for layer in range(shape.num_layers):
        numbers = numbers_of_layer(shape, shape.is_moe_layer(layer))
        dense, routed = dense + numbers.fixed, routed + numbers.routed
    used = routed * shape.moe.top_k // shape.moe.num_experts if shape.moe is not None else 0
    return ParameterCount(
        dense=dense,
        routed=routed,
        mtp=sum(_mtp_numbers(shape, index) for index in range(shape.num_mtp_layers)),
        active=dense + used,
    )


def _mtp_numbers(shape: ModelShape, index: int) -> int:
    layer = numbers_of_layer(shape, shape.moe is not None)
    around = sum(entry.size for entry in mtp_entries(shape, index, ()) if ".transformer_layer." not in entry.name)
    return layer.fixed + layer.routed + around
