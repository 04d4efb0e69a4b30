"""Worker: vLLM's CUDA build on a node of eight H100 that are not there. It parses and configures; no kernel runs.

usage: vllm_gpu.py commands FILE    FILE is JSON, a list of `vllm serve` arguments; prints JSON, what engine each makes
       vllm_gpu.py sources          drives our weight source through vLLM's own trainer engine; prints JSON
       vllm_gpu.py engines          prints JSON, the weight-transfer engines that our plugin registers
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


class Source:
    """A weight source of ours, and how often it was read."""

    def __init__(self) -> None:
        self.tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
        self.passes = 0

    def metadata(self) -> list:
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self):
        self.passes += 1
        return iter(self.tensors.items())


class Client:
    """Notes what vLLM's engine asks of the servers."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        return lambda *_: self.calls.append(name)


def drive_sources() -> dict:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    from megatron_r1.engines.vllm.trainer_source import vllm_source

    def engine_of(rank: int, source: Source, client: Client):
        info = NCCLTrainerInitInfo(
            rank=rank, master_address="127.0.0.1", master_port=29_999, world_size=2, packed_buffer_size_bytes=1 << 20
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=vllm_source(source))

    source, client = Source(), Client()
    follower = engine_of(1, source, client)  # takes part in the gather, talks to nobody
    follower.send_weights()
    wrapped = vllm_source(source)
    meta = wrapped.metadata() if callable(wrapped.metadata) else wrapped.metadata
    sent = list(NCCLTrainerWeightTransferEngine._checked_iter(wrapped, meta))
    try:
        engine_of(0, source, client)
        failure = "none"
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return {
        "passes": source.passes,
        "calls": client.calls,
        "sent": [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in sent],
        "sender": failure,
    }


def registered_engines() -> dict:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_r1.engines.vllm.plugin import ENGINES, register

    register()
    register()
    found = {}
    for backend in ENGINES:
        made = WeightTransferEngineFactory._registry[backend]
        engine = made() if callable(made) and not isinstance(made, type) else made
        found[backend] = {"class": engine.__name__, "missing": sorted(getattr(engine, "__abstractmethods__", ()))}
    return found


def main(words: list[str]) -> None:
    pretend_node()
    if words[0] == "commands":
        answer: object = [configure(arguments) for arguments in json.loads(Path(words[1]).read_text())]
    else:
        answer = drive_sources() if words[0] == "sources" else registered_engines()
    print(f"\nANSWER {json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
