"""Generation with vLLM: servers, client, collection of groups, and weights that follow the trainer.

Everything here talks to real `vllm` api servers in processes of their own; nothing is imported from vLLM in
the trainer process except by the nccl and ipc weight-transfer backends. Rewards and advantages are not here.
"""

from megatron_r1.rollout.client import EngineClient
from megatron_r1.rollout.collect import Collected, collect
from megatron_r1.rollout.server import Engine, start_engines
from megatron_r1.rollout.sync import SyncReport, WeightSync

__all__ = ["Collected", "Engine", "EngineClient", "SyncReport", "WeightSync", "collect", "start_engines"]
