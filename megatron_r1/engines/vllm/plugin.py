"""What vLLM loads into each of its processes (entry point `vllm.general_plugins`): our weight-transfer engines.

Registration only, by name: vLLM imports an engine when a configuration asks for it. vLLM may call a plugin more than
once in a process.
"""

from __future__ import annotations

ENGINES = {
    "shards": ("megatron_r1.engines.vllm.shard_engine", "ShardWeightTransferEngine"),
    "host_ipc": ("megatron_r1.engines.vllm.ipc_engine", "SharedMemoryWeightTransferEngine"),
    "layerwise_nccl": ("megatron_r1.engines.vllm.nccl_engine", "LayerwiseNCCLWeightTransferEngine"),
}
"""Backend of vLLM's --weight-transfer-config -> module and class."""


def register() -> None:
    """Add our engines to vLLM's worker-side weight-transfer factory."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, (module, name) in ENGINES.items():
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, module, name)
