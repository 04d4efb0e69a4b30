"""A weight source whose matrices are sent in DeepSeek's FP8 form: e4m3 numbers and a scale for each square block.

Servers that were started from an FP8 folder take weights in that form; quantising before the transfer halves its bytes
and leaves nothing to do at the other end. Which weights have scales is read from that folder, so that sender and
server agree. Works on the device where the tensors are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from megatron_r1.engines.buckets import ParamSpec
from megatron_r1.engines.source import WeightSource
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX, quantise, scale_shape


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
                codes, scales = quantise(tensor, block=self._block, power_of_two=self._power_of_two)
                yield name, codes
                yield name + SCALE_SUFFIX, scales
            else:
                yield name, tensor
