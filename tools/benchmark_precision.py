"""Train the same model on the same data in several precisions: loss curves, speed and memory side by side.

usage: python tools/benchmark_precision.py --config CONFIG_JSON --dtypes bf16 fp8 [--layers 4] [--experts 16]
           [--vocabulary 16384] [--steps 50] [--tokens 4096] [--recipe blockwise] [--device cuda] [--json OUT]

CONFIG_JSON is a model's config.json (no weights are read: they are random, the same for all). --layers, --experts and
--vocabulary cut it to what one device holds, at its own width. Data are random walks over the vocabulary, which can be
learnt. FLOPs are 6 per active parameter and token. One rank; FP8 needs Transformer Engine and an H100 or newer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_r1.config.schema import FP8Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.config.trainer_faults import train_faults
from megatron_r1.errors import ConfigError
from megatron_r1.planning.parameters import count_parameters

WARM = 3
"""First steps, which are not timed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp8"], choices=["fp32", "bf16", "fp8"])
    parser.add_argument("--recipe", default="blockwise", choices=["blockwise", "tensorwise", "delayed", "mxfp8"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=4096, help="of one step")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cut(
            arguments.config,
            Path(folder),
            layers=arguments.layers,
            experts=arguments.experts,
            vocabulary=arguments.vocabulary,
        )
        try:
            result = measure(
                Path(folder),
                arguments.dtypes,
                steps=arguments.steps,
                tokens=arguments.tokens,
                recipe=FP8Config(recipe=arguments.recipe),
                cpu=arguments.device == "cpu",
            )
        except ConfigError as error:
            print(f"benchmark_precision: {error}")
            return 2
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def cut(
    source: Path, target: Path, *, layers: int | None = None, experts: int | None = None, vocabulary: int | None = None
) -> None:
    """target/config.json: that of `source` with fewer layers, experts and tokens, without MTP layers, not in FP8."""
    fields = json.loads(source.read_text(encoding="utf-8"))
    fields.pop("quantization_config", None)
    fields["num_nextn_predict_layers"] = 0
    if layers is not None:
        fields["num_hidden_layers"] = layers
        if "first_k_dense_replace" in fields:
            fields["first_k_dense_replace"] = min(fields["first_k_dense_replace"], 1)
    if experts is not None:
        fields["n_routed_experts"] = experts
    if vocabulary is not None:
        fields["vocab_size"] = vocabulary
    (target / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def measure(
    folder: Path, dtypes: list[str], *, steps: int, tokens: int, recipe: FP8Config, cpu: bool
) -> dict[str, Any]:
    """{dtype: losses, seconds (median of a step), tokens_per_second, tflops, peak_gib} and the model's size. Raises
    ConfigError for a precision that this machine does not have."""
    shape = load_shape(folder)
    trains = {
        dtype: TrainConfig(
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            fp8=recipe,
            tokens_per_microbatch=tokens,
            threads_per_rank=len(os.sched_getaffinity(0)),
        )
        for dtype in dtypes
    }
    model = ModelConfig(path=folder, initialise="random")
    faults = [fault for train in trains.values() for fault in train_faults(train, ParallelConfig(), model, shape)]
    if faults:
        raise ConfigError(faults)
    count = count_parameters(shape)
    found: dict[str, Any] = {"parameters": count.total, "active_parameters": count.active, "dtypes": {}}
    from megatron_r1.policy.platform import configure_process

    configure_process(threads=len(os.sched_getaffinity(0)), cpu=cpu)
    for dtype, train in trains.items():
        found["dtypes"][dtype] = train_one(shape, model, train, steps=steps, tokens=tokens, cpu=cpu)
        row = found["dtypes"][dtype]
        row["tflops"] = 6 * count.active * row["tokens_per_second"] / 1e12
    return found


def train_one(shape: Any, model: ModelConfig, train: TrainConfig, *, steps: int, tokens: int, cpu: bool) -> dict:
    """One precision's run."""
    import numpy as np
    import torch

    from megatron_r1.config.packages import has_module
    from megatron_r1.data.packing import RowLayout, pack_rank
    from megatron_r1.policy import topology
    from megatron_r1.policy.policy import Policy
    from megatron_r1.stages.sft.loss import sft_loss
    from megatron_r1.types import TrainingSequence

    topology.initialise(ParallelConfig(), seed=0, cpu=cpu)
    device = torch.device("cpu" if cpu else "cuda")
    policy = Policy(
        shape,
        parallel=ParallelConfig(),
        train=train,
        model=model,
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=5),
        total_steps=steps,
        device=device,
        transformer_engine=not cpu and has_module("transformer_engine"),
    )
    layout = RowLayout(tokens_per_microbatch=tokens)
    chance = np.random.default_rng(0)
    losses, seconds = [], []
    if not cpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        ids = walks(chance, shape.vocab_size, tokens)
        weight = np.where(np.arange(tokens) > 0, 1.0 / (tokens - 1), 0.0).astype(np.float32)
        sequence = TrainingSequence(token_ids=ids, loss_mask=np.arange(tokens) > 0, token_weight=weight)
        rows = pack_rank([sequence], layout, rank=0, num_ranks=1)
        begun = time.perf_counter()
        losses.append(policy.step(rows, sft_loss).loss)
        if not cpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    topology.finalise()
    median = statistics.median(seconds[WARM:] or seconds)
    peak = 0 if cpu else torch.cuda.max_memory_allocated() / 2**30
    return {"losses": losses, "seconds": median, "tokens_per_second": tokens / median, "peak_gib": peak}


def walks(chance: Any, vocab: int, tokens: int) -> Any:
    """i32[tokens]: each token is the one before plus 1, 2 or 3, so that a third of the choices can be known."""
    import numpy as np

    return (np.cumsum(chance.integers(1, 4, tokens)) % min(vocab, 1000)).astype(np.int32)


def show(result: dict[str, Any]) -> None:
    rows = result["dtypes"]
    base = rows[next(iter(rows))]["losses"]
    print(f"{result['parameters'] / 1e6:,.1f}M parameters, {result['active_parameters'] / 1e6:,.1f}M active per token")
    print("| precision | first loss | last loss | farthest from the first row | tokens/s | TFLOP/s | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype, row in rows.items():
        apart = max(abs(one - other) / abs(other) for one, other in zip(row["losses"], base, strict=True))
        print(
            f"| {dtype} | {row['losses'][0]:.4f} | {row['losses'][-1]:.4f} | {apart:.2%} | "
            f"{row['tokens_per_second']:,.0f} | {row['tflops']:.3f} | {row['peak_gib']:.2f} |"
        )


if __name__ == "__main__":
    raise SystemExit(main())
