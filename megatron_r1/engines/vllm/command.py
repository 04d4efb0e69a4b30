"""How a vLLM server is told what to do: its command line and its environment.

Every third-party environment variable of the servers is set in `server_environment` and nowhere else. The
trainer's own variables are not here. Chosen for the shortest start: eager execution on CPU and an explicit
KV-cache size, with which vLLM skips its warm-up passes; on CPU with one worker the engine runs the model in
its own process, which saves a whole interpreter start (about 9 s of imports) and a message queue per step.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config import RolloutConfig
from megatron_r1.config.architectures import architecture_of
from megatron_r1.config.deadlines import folder_bytes, stall_seconds, start_seconds
from megatron_r1.config.shape import hf_files, load_shape
from megatron_r1.config.vllm_args import command_words
from megatron_r1.engines.vllm.auth import TOKEN_VARIABLE
from megatron_r1.engines.vllm.plugin import BACKEND

COMPILED_MLA_HEAD_SIZE = 576
"""vLLM's CPU MLA kernel exists for kv_lora_rank + qk_rope_head_dim = 512 + 64 only."""

CPU_BLOCK_SIZE = 32
"""Tokens per KV block: prompts share whole blocks only, and vLLM's default of 128 on CPU is longer than most
prompts.
"""

MIN_BATCHED_TOKENS = 8192

GLOO_SECONDS = 1800
"""torch's own wait for a gloo collective."""

CPU_CUSTOM_OPS = ["all", "-rotary_embedding"]
"""vLLM 0.32's compiled rotary embedding on CPU rotates queries of shape [tokens, heads, size] wrongly, as
DeepSeek-V3 gives them (logprobs off by 1); its plain PyTorch version agrees with transformers to 1e-6.
"""

CPU_ROUTES = "megatron_r1.engines.vllm.cpu_routes"

VLLM_DTYPE = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpan:
    """A server over several nodes, and which of them a process is for. Its workers meet at `address`:`port` of node 0;
    the other nodes have workers only and answer no requests."""

    nodes: int
    node: int
    address: str
    port: int


def server_command(
    config: RolloutConfig,
    *,
    model_path: Path,
    host: str,
    port: int,
    seed: int,
    reward_model: bool = False,
    span: NodeSpan | None = None,
) -> list[str]:
    """The command line of one server. It holds no secret: other users can read it. `reward_model`: it gives one value
    for a text (/pooling) instead of more text, and keeps the weights that it was started with. `span`: it is one
    node's part of a server over several, started by vLLM itself without Ray."""
    flags: dict[str, str | int | float] = {
        "--model": str(model_path),
        "--host": host,
        "--port": port,
        "--seed": seed,
        "--dtype": VLLM_DTYPE[config.dtype],
        "--tensor-parallel-size": config.tensor_parallel,
        "--max-model-len": config.max_model_len,
        "--max-num-seqs": config.max_num_seqs,
        "--gpu-memory-utilization": config.memory_fraction,
        "--middleware": "megatron_r1.engines.vllm.auth.TokenMiddleware",
    }
    switches = ["--disable-uvicorn-access-log"]
    if config.expert_parallel and config.tensor_parallel > 1 and has_experts(model_path):
        switches.append("--enable-expert-parallel")
    if config.kv_cache_dtype != "auto":
        flags["--kv-cache-dtype"] = config.kv_cache_dtype
    if reward_model:
        flags |= {"--runner": "pooling", "--convert": "classify"}
    else:
        flags |= {
            "--weight-transfer-config": json.dumps({"backend": BACKEND}),
            "--logprobs-mode": "processed_logprobs",
            "--generation-config": "vllm",
        }
        # Scale-out is /inference/v1/generate: token ids in, token ids and weight versions out.
        switches += ["--enable-prefix-caching", "--enable-scale-out"]
        if config.draft_tokens:
            draft = {"method": "mtp", "num_speculative_tokens": config.draft_tokens}
            flags["--speculative-config"] = json.dumps(draft)
    if config.routes != "off" and not reward_model:
        if config.device == "cpu":
            flags |= {"--worker-cls": f"{CPU_ROUTES}.RoutesWorker", "--scheduler-cls": f"{CPU_ROUTES}.RoutesScheduler"}
        else:
            switches.append("--enable-return-routed-experts")
    if config.device == "cpu":
        # Prompts must not be split over steps: with per-request seeds vLLM 0.32 then rewinds a CPU random
        # generator, which raises and kills the engine.
        flags["--max-num-batched-tokens"] = max(config.max_model_len, MIN_BATCHED_TOKENS)
        flags["--kv-cache-memory-bytes"] = int(config.kv_cache_gib * 2**30)
        flags["--block-size"] = CPU_BLOCK_SIZE
        flags["--compilation-config"] = json.dumps({"custom_ops": CPU_CUSTOM_OPS})
        switches += ["--no-enable-chunked-prefill", "--enforce-eager"]
        # What is read from the cache is computed with other shapes, and rounded otherwise.
        switches += ["--no-enable-prefix-caching"] if reward_model else []
    else:
        switches += ["--enforce-eager"] if config.enforce_eager else []
        # A worker that has read its part waits in NCCL (600 s by default) or gloo (1,800 s) for the slowest one.
        waits = max(GLOO_SECONDS, math.ceil(start_seconds(config, folder_bytes(model_path))))
        flags |= {"--distributed-timeout-seconds": waits, "--cpu-distributed-timeout-seconds": waits}
    if config.device == "cuda" and config.sleep_level:
        switches.append("--enable-sleep-mode")  # on a CPU the routes are there without it, and move nothing
    if not list(model_path.glob("*.safetensors")):
        flags["--load-format"] = "dummy"
    if overrides := model_overrides(model_path):
        flags["--hf-overrides"] = json.dumps(overrides)
    if span is not None:
        flags |= {
            "--distributed-executor-backend": "mp",
            "--nnodes": span.nodes,
            "--node-rank": span.node,
            "--master-addr": span.address,
            "--master-port": span.port,
        }
        switches += ["--headless"] if span.node else []
    arguments = [str(part) for flag in flags.items() for part in flag]
    own = [sys.executable, "-m", "megatron_r1.engines.vllm.launch", str(os.getpid()), *arguments, *switches]
    return own if reward_model else [*own, *command_words(config)]


def server_environment(
    config: RolloutConfig,
    *,
    base: Mapping[str, str],
    model_path: Path,
    host: str,
    token: str,
    private_dir: Path,
    visible_devices: str | None,
    span: NodeSpan | None = None,
) -> dict[str, str]:
    """`base` with every third-party variable of a server.

    `private_dir` (mode 0700) takes the engine's unix sockets, rendezvous files and temporary files. Over several nodes
    (`span`) gloo keeps the interface that `base` names.
    """
    environment = dict(base)
    for name in (
        "VLLM_CPU_KVCACHE_SPACE",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        environment.pop(name, None)  # a torchrun parent's, and a cache size that would override ours
    environment |= {
        TOKEN_VARIABLE: token,
        "VLLM_SERVER_DEV_MODE": "1",  # the pause and weight-update routes
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_RPC_BASE_PATH": str(private_dir),
        "TMPDIR": str(private_dir),
        "VLLM_HOST_IP": host,
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "86400",  # a connection dropped while idle looks like a death
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(start_seconds(config, folder_bytes(model_path)))),
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(math.ceil(stall_seconds(config))),  # one step of several workers
    }
    if span is None:
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the server's workers share a host
    if config.device == "cpu":
        environment |= {
            "OMP_NUM_THREADS": str(config.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
            "KMP_BLOCKTIME": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer and other servers share the cores
            "TORCH_COMPILE_DISABLE": "1",
            "VLLM_MLA_DISABLE": "0" if mla_head_size(model_path) == COMPILED_MLA_HEAD_SIZE else "1",
        }
        if config.tensor_parallel == 1 and span is None:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model runs in the engine's own process
    elif visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices
    return environment


def model_overrides(model_path: Path) -> dict[str, object]:
    """Fields of config.json that vLLM must be told, because it reads their absence, null or another spelling otherwise
    than transformers. Without the first two it takes softmax for DeepSeek-V3's router, and drops its biases;
    transformers 5 does not write them. Nothing for a folder without config.json, of which vLLM complains itself."""
    file = hf_files(model_path) / "config.json"
    fields = json.loads(file.read_text()) if file.exists() else {}
    found: dict[str, object] = {}
    architecture = architecture_of(fields.get("model_type"))
    if architecture is not None and architecture.name == "deepseek_v3":
        usual = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        found |= {name: value for name, value in usual.items() if fields.get(name) is None}
        if any(name in fields and not fields[name] for name in ("n_group", "topk_group")):
            found |= {"n_group": 1, "topk_group": 1}
    if fields.get("model_type") == "deepseek_v2" and fields.get("topk_method", "greedy") == "greedy":
        # It would choose among groups whatever the method is, and has no word for none.
        found |= {name: 1 for name in ("n_group", "topk_group") if fields.get(name) != 1}
    if fields.get("hidden_act") == "swish":
        found["hidden_act"] = "silu"
    return found


def has_experts(model_path: Path) -> bool:
    """Whether the folder's model is a mixture of experts (a teacher or reward model beside one need not be)."""
    return load_shape(model_path).moe is not None


def mla_head_size(model_path: Path) -> int:
    """kv_lora_rank + qk_rope_head_dim of config.json; 0 for a model without latent attention."""
    fields = json.loads((model_path / "config.json").read_text())
    return (fields.get("kv_lora_rank") or 0) + (fields.get("qk_rope_head_dim") or 0)
