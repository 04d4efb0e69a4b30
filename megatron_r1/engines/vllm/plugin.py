"""What vLLM loads into each of its processes (entry point `vllm.general_plugins`): our weight-transfer engine.

Registration only, by name: vLLM imports the engine when a configuration asks for it. vLLM may call a plugin more than
once in a process.
"""

from __future__ import annotations

BACKEND = "shards"
"""Its name in vLLM's --weight-transfer-config."""


def register() -> None:
    """Add our engine to vLLM's worker-side weight-transfer factory."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        module = "megatron_r1.engines.vllm.shard_engine"
        WeightTransferEngineFactory.register_engine(BACKEND, module, "ShardWeightTransferEngine")
