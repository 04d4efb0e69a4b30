"""The CPU as a platform for Megatron-Core: the only place that patches a library.

Megatron-Core is written for CUDA. On a machine without it, a handful of calls need a CPU meaning; they are listed here,
each with its reason, and applied once by `use_cpu`. On GPUs nothing is patched. `configure_process` sets thread counts
and the environment variables of third parties; nothing else in this project sets any for the trainer.
"""

# Patching is what this file is for.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device as torch_device_context

from megatron_r1.errors import ConfigError

DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""What Transformer Engine, cuBLAS and NCCL read, and the values under which they are deterministic (those that
Megatron's own training accepts; of NCCL's a list separated by commas). The first is set where there is none."""


def configure_process(*, threads: int, cpu: bool, deterministic: bool = False) -> None:
    """Call before the first import of megatron.core. Threads: OpenMP and torch threads of this rank.

    `deterministic`: libraries use algorithms that give the same bits every time, and torch refuses operations that
    have none. Raises ConfigError if the environment asks a library for another one.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.set_num_threads(threads)
    for message in ("Apex is not installed", "Transformer Engine and Apex are not installed"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    if deterministic:
        _choose_deterministic_algorithms()
    if cpu:
        use_cpu()


def _choose_deterministic_algorithms() -> None:
    for name, accepted in DETERMINISTIC.items():
        found = os.environ.setdefault(name, accepted[0])
        if not set(found.split(",")) <= set(accepted):
            raise ConfigError(
                f"train.deterministic is True and the environment's {name} is {found}; deterministic runs need "
                f"{' or '.join(accepted)}: unset {name}, or use --train.no-deterministic"
            )
    torch.use_deterministic_algorithms(True)


@functools.cache
def use_cpu() -> None:
    """Give the CUDA calls that Megatron-Core makes unconditionally a CPU meaning. Idempotent."""
    _patch_compiler()
    _patch_devices()
    _patch_factories()
    _patch_megatron()


class _CPUStream:
    """Work on a CPU is in order, so a stream has nothing to do. A class: libraries annotate with `Stream | None`."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, _: object) -> None: ...
    def wait_event(self, _: object) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: object = None) -> _CPUEvent:
        return event if isinstance(event, _CPUEvent) else _CPUEvent()

    def __enter__(self) -> _CPUStream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _CPUEvent:
    """An event on an in-order CPU has always happened."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def record(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *_: object) -> None: ...
    def query(self) -> bool:
        return True


def _patch_compiler() -> None:
    """Megatron's jit_fuser is torch.compile, which would start the inductor compiler: tens of seconds for a model of
    milliseconds. Switched off (TORCH_COMPILE_DISABLE) it still imports dynamo and inductor, half of a rank's start."""

    def uncompiled(model: Callable[..., Any] | None = None, **_: object) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = uncompiled


def _patch_devices() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"  # used as device= of tensor factories
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = lambda *_, **__: _CPUStream()
    cuda.default_stream = lambda *_, **__: _CPUStream()
    cuda.stream = lambda stream=None: _CPUStream()
    cuda.Stream = _CPUStream
    cuda.Event = _CPUEvent
    # The RNG tracker saves and restores "the device's" generator: here the one CPU generator.
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda self, *_, **__: self
    # The optimizer sorts parameters by the string of Tensor.type(), e.g. "torch.cuda.FloatTensor".
    original_type = torch.Tensor.type
    torch.Tensor.type = lambda self, dtype=None, *rest, **named: (
        original_type(self).replace("torch.", "torch.cuda.")
        if dtype is None
        else original_type(self, dtype, *rest, **named)
    )


def _patch_factories() -> None:
    """Factory calls with device="cuda" (the optimizer's flags, schedules' counters) make CPU tensors."""
    # torch's `with torch.device(...)` looks the factories up once, by identity; let it see the originals.
    torch_device_context._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like", "ones_like", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: object, **kwargs: object) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        elif kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _patch_megatron() -> None:
    # Where it is installed, Megatron calls its kernels (router, gradient norm, Adam) whatever the layers are made of.
    hidden = "transformer_engine" not in sys.modules
    if hidden:
        sys.modules["transformer_engine"] = None  # pyright: ignore[reportArgumentType] - an import fails, as if absent
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.core.transformer.multi_latent_attention as mla

    # Without Transformer Engine this name does not exist, but the router reads it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # Set when any of TE's parts imports; MLA then compares modules with TE classes that are None.
    if mla.TELinear is None or hidden:
        mla.HAVE_TE = False
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It warns whenever the CPU generator moves inside a fork of the device's: here they are the same one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
    # Experts that are split over tensor ranks gather tokens, of which each rank has another number; gloo has no such
    # collectives.
    mappings._gather_along_first_dim = _gather_ragged(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_ragged(mappings._reduce_scatter_along_first_dim)


def _gather_ragged(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's gather of rows [n_r, ...] over a group -> [sum of n_r, ...]; parts of unequal length are filled up to
    the longest."""

    @functools.wraps(even)
    def gather(input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any, **named: Any):
        if output_split_sizes is None or group.size() == 1:
            return even(input_, group, output_split_sizes, *rest, **named)
        longest = max(output_split_sizes)
        filled = input_.new_zeros((longest, *input_.shape[1:]))
        filled[: len(input_)] = input_
        parts = [torch.empty_like(filled) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, filled, group=group)
        return torch.cat([part[:rows] for part, rows in zip(parts, output_split_sizes, strict=True)])

    return gather


def _reduce_scatter_ragged(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The gather's reverse: the sum of all ranks' [sum of n_r, ...], of which each keeps its n_r rows."""

    @functools.wraps(even)
    def reduce_scatter(input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any, **named: Any):
        if input_split_sizes is None or group.size() == 1:
            return even(input_, group, input_split_sizes, *rest, **named)
        summed = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed, group=group)
        return torch.split(summed, list(input_split_sizes))[group.rank()].clone()

    return reduce_scatter


def _to_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Megatron's version acts only on CUDA tensors, and the all-to-all wants host integers."""
    if isinstance(tensor, torch.Tensor) and as_numpy:
        return tensor.numpy()
    return tensor
