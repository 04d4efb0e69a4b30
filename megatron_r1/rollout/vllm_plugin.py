"""What vLLM loads into each of its processes (entry point `vllm.general_plugins`): the gloo weight transfer.

Registration only, by name: vLLM imports the engine when a configuration asks for it. vLLM may call a plugin
more than once in a process.
"""

from __future__ import annotations


def register() -> None:
    """Add the "gloo" backend to vLLM's worker-side and trainer-side weight-transfer factories."""
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    module = "megatron_r1.rollout.gloo_engine"
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", module, "GlooWeightTransferEngine")
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", module, "GlooTrainerWeightTransferEngine")
