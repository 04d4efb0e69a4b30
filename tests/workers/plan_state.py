"""Worker: what real Megatron models hold, by rank and layout.

usage: plan_state.py STORE FILE; FILE is JSON with `cases` ({config, parallel, dtype, distributed, train_mtp, places})
and `backend`. Rank r writes FILE with the suffix .r.out: for every case and place the measured numbers. With the
backend "fake" this one process is told to be rank `place` of a world of any size: Megatron builds that rank's groups,
model, buffers and optimizer, and only the collectives do nothing. With "gloo" the ranks are real and each measures
itself.
A case with `meta` builds the model alone, without memory.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import ModelShape, shape_from_config  # noqa: E402
from megatron_r1.model.build import build_model_chunks  # noqa: E402
from megatron_r1.model.transformer_config import transformer_config  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402


def main(store: str, file: Path) -> None:
    request = json.loads(file.read_text())
    real = request["backend"] == "gloo"
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found = []
    for number, case in enumerate(request["cases"]):
        for place in [rank] if real else case["places"]:
            os.environ["WORLD_SIZE"], os.environ["RANK"] = str(case["parallel"]["world_size"]), str(place)
            if not real:
                dist.init_process_group(
                    "fake", rank=place, world_size=case["parallel"]["world_size"], store=FakeStore()
                )
            parallel = ParallelConfig(**case["parallel"])
            topology.initialise(parallel, seed=1, cpu=True, store_path=f"{store}-{number}" if real else None)
            found.append({"case": number, **measure(shape_from_config(case["config"]), parallel, case)})
            topology.finalise()
    os.environ["WORLD_SIZE"], os.environ["RANK"] = str(world), str(rank)
    file.with_suffix(f".{rank}.out").write_text(json.dumps(found))


def measure(shape: ModelShape, parallel: ParallelConfig, case: dict) -> dict:
    places = {
        "pipeline_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "data_rank": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "expert_data_rank": parallel_state.get_expert_data_parallel_rank(),
    }
    train = TrainConfig(dtype=case["dtype"])
    if case.get("meta"):
        config = transformer_config(shape, parallel, train, transformer_engine=False)
        with on_meta():
            chunks = build_model_chunks(shape, config, transformer_engine=False)
        assert all(item.is_meta for chunk in chunks for item in chunk.parameters())
        return {**places, "parameters": sum(item.numel() for chunk in chunks for item in chunk.parameters())}
    policy = Policy(
        shape,
        parallel=parallel,
        train=train,
        model=ModelConfig(path=Path("unused"), initialise="random", train_mtp=case["train_mtp"]),
        optimizer=OptimizerConfig(distributed=case["distributed"]),
        total_steps=1,
        device=torch.device("cpu"),
    )
    policy.optimizer.step()  # Adam makes its moments at the first step
    return {**places, **held(policy)}


def on_meta():
    """Megatron names its device itself (`torch.cuda.current_device()`): that name is meta here."""
    torch.cuda.current_device = lambda: "meta"
    return torch.device("meta")


def held(policy: Policy) -> dict:
    """Bytes of whole storages, each counted once: two views of one buffer are one."""
    models = [chunk.module for chunk in policy.chunks]
    weights = storages([*(item for model in models for item in (*model.parameters(), *biases(model)))])
    buffers = [buffer for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = storages([buffer.grad_data for buffer in buffers])
    optimizer = {}
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        if part.is_stub_optimizer:
            continue
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                state = part.optimizer.state[weight]
                optimizer |= storages([weight, state["exp_avg"], state["exp_avg_sq"]])
    return {
        "parameters": sum(item.numel() for model in models for item in model.parameters()),
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(size for key, size in optimizer.items() if key not in weights),
    }


def biases(model: torch.nn.Module) -> list[torch.Tensor]:
    names = ("expert_bias", "local_tokens_per_expert")
    return [buffer for name, buffer in model.named_buffers() if name.endswith(names)]


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    found = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}
    return {key: size for key, size in found.items() if size}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
