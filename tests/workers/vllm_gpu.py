"""Worker: vLLM's CUDA build on a node of eight H100 that are not there. It parses and configures; no kernel runs.

usage: vllm_gpu.py commands FILE    FILE is JSON, a list of `vllm serve` arguments; prints JSON, what engine each makes
       vllm_gpu.py nccl             makes a communicator as far as it goes; prints JSON
       vllm_gpu.py engine           prints JSON, the weight-transfer engine that our plugin registers
libcuda.so.1 must be found: tests/gpu_paths/conftest.py makes one whose functions say that there is no device.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch


def pretend_node() -> None:
    """Answer vLLM's questions as eight H100 would. Before vLLM looks for its platform."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=80 << 30,
        multi_processor_count=132,
        uuid="GPU-0",
        L2_cache_size=50 << 20,
        warp_size=32,
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = torch.accelerator.device_count = lambda: 8
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_name = lambda *_: properties.name
    done = types.SimpleNamespace(synchronize=lambda: None)
    torch.cuda.current_stream = torch.accelerator.current_stream = lambda *_: done
    import vllm.platforms as platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    NonNvmlCudaPlatform.device_count = classmethod(lambda cls: 8)
    platforms._current_platform = NonNvmlCudaPlatform()


def configure(arguments: list[str]) -> dict:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli import serve

    parsed = serve.make_arg_parser(serve.FlexibleArgumentParser()).parse_args(arguments)
    config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    parallel = config.parallel_config
    return {
        "tensor": parallel.tensor_parallel_size,
        "nodes": parallel.nnodes,
        "experts": parallel.enable_expert_parallel,
        "backend": config.weight_transfer_config.backend if config.weight_transfer_config else None,
        "quantization": config.model_config.quantization,
        "cache": config.cache_config.cache_dtype,
        "sleep": config.model_config.enable_sleep_mode,
        "runner": config.model_config.runner_type,
        "draft": config.speculative_config.num_speculative_tokens if config.speculative_config else 0,
        "length": config.model_config.max_model_len,
        "scale_out": parsed.enable_scale_out,
    }


def enter_nccl() -> dict:
    import base64

    from megatron_r1.engines.vllm.nccl_peers import NcclPeers, new_identifier
    from megatron_r1.engines.vllm.peers import Meeting

    place = new_identifier()
    meeting = Meeting(sync="nccl", place=place, trainers=1, workers=1, timeout_seconds=5)
    try:
        NcclPeers(meeting, 0, torch.device("cuda", 0))
        failure = "none"
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return {"bytes": len(base64.b64decode(place)), "entering": failure}


def registered_engine() -> dict:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_r1.engines.vllm.plugin import BACKEND, register

    register()
    register()
    made = WeightTransferEngineFactory._registry[BACKEND]
    engine = made() if callable(made) and not isinstance(made, type) else made
    return {"class": engine.__name__, "missing": sorted(getattr(engine, "__abstractmethods__", ()))}


def main(words: list[str]) -> None:
    pretend_node()
    if words[0] == "commands":
        answer: object = [configure(arguments) for arguments in json.loads(Path(words[1]).read_text())]
    else:
        answer = enter_nccl() if words[0] == "nccl" else registered_engine()
    print(f"\nANSWER {json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
