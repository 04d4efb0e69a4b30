"""An H100 that is not there, so that Transformer Engine's modules can be built on a CPU: they can be named, filled and
read; every product is a kernel and cannot run.

Import it before anything of Megatron's or Transformer Engine's.
"""

from __future__ import annotations

import types

import torch

from megatron_r1.policy.platform import configure_process

CAPABILITY = (9, 0)


def pretend_gpu(*, capability: tuple[int, int] = CAPABILITY, deterministic: bool = False) -> None:
    """Answer as a machine with one such GPU would; tensors on it are the CPU's (the CPU platform's patches)."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100", major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=80 << 30
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_name = lambda *_: properties.name
    import transformer_engine.pytorch  # noqa: F401 - or the CPU platform would hide it

    configure_process(threads=1, cpu=True, deterministic=deterministic)
