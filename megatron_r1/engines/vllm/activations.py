"""Start a vLLM server that can record (activation_hooks.py), and have it do so for one prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_r1.activations import LOGPROBS, TOKEN_IDS
from megatron_r1.config import RolloutConfig
from megatron_r1.engines.base import EngineSpec
from megatron_r1.engines.vllm.server import LocalEngine

RECORDER = "megatron_r1.engines.vllm.activation_hooks.Recorder"


def recording_config(config: RolloutConfig) -> RolloutConfig:
    """`config` for a server that records: no compilation, and on a GPU a prompt is one step, as on a CPU."""
    words = [f"worker-extension-cls={RECORDER}"]
    if config.device == "cuda":
        words += [f"max-num-batched-tokens={config.max_model_len}", "no-enable-chunked-prefill"]
    return dataclasses.replace(config, enforce_eager=True, vllm_args=(*config.vllm_args, *words))


def record(engine: LocalEngine, token_ids: Sequence[int], file: Path) -> None:
    """Write what the server's model computes for these tokens to `file` (megatron_r1.activations says what). The server
    must have been started with `recording_config`. EngineError if it fails; ValueError if the tokens do not fit."""

    def call(method: str, argument: str) -> None:
        engine.client.request("POST", "/collective_rpc", {"method": method, "args": [argument]})

    # A score asks for logprobs of the prompt, for which vLLM reads no cache of earlier prompts.
    call("begin_activations", str(len(token_ids)))
    logprobs = engine.client.score(token_ids)
    call("end_activations", str(file.resolve()))
    known = {LOGPROBS: torch.from_numpy(logprobs), TOKEN_IDS: torch.tensor(token_ids)}
    save_file(load_file(file) | known, file)


def record_once(spec: EngineSpec, token_ids: Sequence[int], file: Path) -> None:
    """`record` with a server of its own, which is stopped again."""
    with LocalEngine(dataclasses.replace(spec, config=recording_config(spec.config))) as engine:
        engine.start()
        engine.wait_ready()
        record(engine, token_ids, file)
