"""A weight source whose matrices are sent in DeepSeek's FP8 form: e4m3 numbers and a scale for each square block.

Servers that were started from an FP8 folder take weights in that form; quantising before the transfer halves its bytes
and leaves nothing to do at the other end. Which weights have scales is read from that folder, so that sender and
server agree. Works on the device where the tensors are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from megatron_r1.rollout.buckets import ParamSpec
from megatron_r1.rollout.source import WeightSource
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX, block_scales, scale_shape


class QuantisedSource:
    """`source` with every weight whose scales are among `served` (the names of the servers' folder) quantised in
    blocks of `block` x `block`; its scales follow it, powers of two where that folder says so."""

    def __init__(
        self, source: WeightSource, served: Collection[str], *, block: int, power_of_two: bool = False
    ) -> None:
        self._source, self._block, self._power_of_two = source, block, power_of_two
        self._scaled = {name for name, _, _ in source.metadata() if name + SCALE_SUFFIX in served}

    def metadata(self) -> Sequence[ParamSpec]:
        """As WeightSource; codes are e4m3, scales f32."""
        specs: list[ParamSpec] = []
        for name, dtype, shape in self._source.metadata():
            if name in self._scaled:
                rows, columns = shape
                specs.append((name, FP8, shape))
                specs.append((name + SCALE_SUFFIX, torch.float32, scale_shape(rows, columns, self._block)))
            else:
                specs.append((name, dtype, shape))
        return specs

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._source:
            if name in self._scaled:
                codes, scales = quantise_blocks(tensor, block=self._block, power_of_two=self._power_of_two)
                yield name, codes
                yield name + SCALE_SUFFIX, scales
            else:
                yield name, tensor


def quantise_blocks(
    weight_RC: torch.Tensor, *, block: int, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3[R, C], f32 scales) as weights.fp8.quantise gives them, with plain tensor operations on any device. Holds
    three fp32 copies of the weight at a time."""
    rows, columns = weight_RC.shape
    tall, wide = scale_shape(rows, columns, block)
    padded = weight_RC.new_zeros(tall * block, wide * block, dtype=torch.float32)
    padded[:rows, :columns] = weight_RC
    tiles = padded.view(tall, block, wide, block)
    scales = block_scales(tiles.abs().amax(dim=(1, 3)), power_of_two=power_of_two)
    codes = (tiles / scales[:, None, :, None]).view(tall * block, wide * block)[:rows, :columns].to(FP8)
    return codes.contiguous(), scales
