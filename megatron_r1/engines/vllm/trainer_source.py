"""Our weight source as vLLM's trainer engines read it, in each supported version (config/packages.py).

vLLM 0.32 calls `metadata()` and iterates the source; 0.33 reads a cached `metadata`, asks what the source implements
and calls `iter_full()`. Both have a base class of that name, and what it declares tells them apart. Nothing else here
looks at vLLM's version.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_r1.engines.buckets import ParamSpec
from megatron_r1.engines.source import WeightSource


def vllm_source(source: WeightSource) -> Any:
    """`source` as an instance of vLLM's WeightSource. Every rank owns every parameter, rank 0's tensors are sent."""
    return _source_class()(source)


@functools.cache
def _source_class() -> type:
    """A subclass of vLLM's WeightSource. Made on demand, because vLLM is imported on demand."""
    from vllm.distributed.weight_transfer import base

    def announce(specs: Sequence[ParamSpec]) -> list[Any]:
        return [base.ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in specs]

    if hasattr(base.WeightSource, "iter_full"):

        class CachedSource(base.WeightSource):
            """0.33's form."""

            def __init__(self, source: WeightSource) -> None:
                self.source = source

            @functools.cached_property
            def metadata(self) -> list[Any]:
                return announce(self.source.metadata())

            def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
                return iter(self.source)

        return CachedSource

    class CalledSource(base.WeightSource):
        """0.32's form."""

        def __init__(self, source: WeightSource) -> None:
            self.source = source

        def metadata(self) -> list[Any]:
            return announce(self.source.metadata())

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(self.source)

    return CalledSource
