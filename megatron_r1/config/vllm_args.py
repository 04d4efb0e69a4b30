"""rollout.vllm_args: arguments for vLLM that no field has, and those that may not be among them.

vLLM takes the last of an argument that is given twice, so one of ours given again would silently win. Left out: whether
vLLM knows the rest, and their values; its own parser says so (preflight, or the server's log).
"""

from __future__ import annotations

import re

from megatron_r1.config.schema import RolloutConfig

_NODES = "the job's roles give it"
_ONE_ENGINE = "weights go to one engine a server, on its tensor_parallel GPUs: use more rollout.num_engines"
_WORKERS = "a server's workers are its tensor_parallel GPUs: use rollout.tensor_parallel"
_CPU = "megatron_r1 sets what vLLM needs on CPUs"

REFUSED: dict[str, str] = {
    "model": "set model.path", "seed": "set seed", "dtype": "set rollout.dtype",
    "tensor-parallel-size": "set rollout.tensor_parallel", "max-model-len": "set rollout.max_model_len",
    "max-num-seqs": "set rollout.max_num_seqs", "gpu-memory-utilization": "set rollout.memory_fraction",
    "enable-expert-parallel": "set rollout.expert_parallel", "no-enable-expert-parallel": "set rollout.expert_parallel",
    "kv-cache-dtype": "set rollout.kv_cache_dtype", "enforce-eager": "set rollout.enforce_eager",
    "no-enforce-eager": "set rollout.enforce_eager", "speculative-config": "set rollout.draft_tokens",
    "weight-transfer-config": "set rollout.sync", "quantization": "set rollout.fp8_folder",
    "distributed-timeout-seconds": "set rollout.start_timeout_seconds",
    "cpu-distributed-timeout-seconds": "set rollout.start_timeout_seconds",
    "hf-overrides": "the trainer reads the same config.json: change that",
    "load-format": "it follows from model.path", "host": "the server's node has it", "port": "a free one is taken",
    "uds": "the trainer speaks HTTP over TCP", "ssl-keyfile": "the trainer speaks plain HTTP",
    "ssl-certfile": "the trainer speaks plain HTTP", "root-path": "the trainer asks for vLLM's own paths",
    "middleware": "every route asks for the server's token", "api-key": "every server has a token of its own",
    "config": "a file could set any other argument", "api-server-count": "the RL routes are those of one API server",
    "disable-log-stats": "a stuck server is told by its counters of tokens",
    "disable-uvicorn-access-log": "it is given already", "enable-scale-out": "it is given already",
    "enable-sleep-mode": "set rollout.sleep_level", "no-enable-sleep-mode": "set rollout.sleep_level",
    "enable-prefix-caching": "it is given already", "no-enable-prefix-caching": "a group shares its prompt",
    "enable-return-routed-experts": "set rollout.routes", "aux-output-config": "set rollout.routes",
    "logprobs-mode": "training needs the logprobs of what was sampled from",
    "generation-config": "sampling is the trainer's: set rollout.sampling",
    "runner": "it follows from the server's role", "convert": "it follows from the server's role",
    **dict.fromkeys(("nnodes", "node-rank", "master-addr", "master-port", "headless"), _NODES),
    "distributed-executor-backend": _NODES,
    **dict.fromkeys(("enable-eplb", "eplb-config"), "a sync would put an expert's weights where it no longer is"),
    **dict.fromkeys(
        ("cpu-offload-gb", "cpu-offload-params", "offload-backend", "offload-group-size", "offload-num-in-group",
         "offload-params", "offload-prefetch-step"), "a sync does not reach weights that are kept in host memory"),
    **dict.fromkeys(("pipeline-parallel-size", "prefill-context-parallel-size"), _WORKERS),
    **{f"data-parallel-{name}": _ONE_ENGINE for name in (
        "size", "size-local", "rank", "start-rank", "address", "rpc-port", "backend", "hybrid-lb", "external-lb",
        "multi-port-external-lb")},
}  # fmt: skip
"""Arguments of vLLM that a field or the start gives, or that would break a run: what to do instead, or why."""

REFUSED_ON_CPU: dict[str, str] = {
    "kv-cache-memory-bytes": "set rollout.kv_cache_gib",
    **dict.fromkeys(("worker-cls", "scheduler-cls"), _CPU),
    **dict.fromkeys(("max-num-batched-tokens", "block-size", "compilation-config"), _CPU),
    **dict.fromkeys(("enable-chunked-prefill", "no-enable-chunked-prefill"), _CPU),
}

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


def argument_faults(rollout: RolloutConfig) -> list[str]:
    """A sentence for every word of rollout.vllm_args that may not be there."""
    refused = REFUSED | (REFUSED_ON_CPU if rollout.device == "cpu" else {})
    faults = []
    for word in rollout.vllm_args:
        if not NAME.fullmatch(word.partition("=")[0]):
            faults.append(
                f"rollout.vllm_args has {word!r}; each is NAME=VALUE or NAME, without dashes before it, such as "
                "max-num-batched-tokens=16384"
            )
            continue
        name = argument_name(word)
        # argparse takes the beginning of a name for the name.
        meant = name if name in refused else next((full for full in refused if full.startswith(name)), None)
        if meant is not None:
            faults.append(f"rollout.vllm_args has {word}; {meant} may not be given there: {refused[meant]}")
    return faults


def argument_name(word: str) -> str:
    """`a_b.c=d` -> `a-b`: vLLM takes underscores, a value after =, and a part of a JSON argument after a dot."""
    return word.partition("=")[0].partition(".")[0].replace("_", "-")


def command_words(rollout: RolloutConfig) -> list[str]:
    """As vLLM's command line has them."""
    return [f"--{word}" for word in rollout.vllm_args]
