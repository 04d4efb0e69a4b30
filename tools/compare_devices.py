"""One GRPO step of a small DeepSeek-V3 on the CPU and on a GPU, from the same weights and the same sequences.

usage: python tools/compare_devices.py [--device cuda] [--dtypes fp32 bf16] [--config CONFIG_JSON] [--json OUT]

The base is the CPU in fp32, which the project's tests hold to transformers. Beside it stands the device in each of
--dtypes: logprobs, loss, gradient norm, and the gradient itself. Each is computed in a process of its own. The model
is V3's layer with V3's own head sizes (which is what GPU attention kernels are made for), four layers, experts, router
and MTP layer included; --config takes another. Its weights are random, far from their initial values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TINY_V3 = ROOT / "megatron_r1" / "recipes" / "tiny_v3"
HEADS = {
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 128, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 1,
}  # fmt: skip
"""Of DeepSeek-V3, but for the number of heads: vLLM's MLA kernels take a latent of 512 + 64 only."""
LENGTHS = (64, 37, 52, 20, 44, 12, 30, 8)
PROMPT = 4
ROW_TOKENS = 128
TABLE = (
    "| device | precision | loss | gradient norm | logprobs: mean, max difference | gradient: difference |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--config", type=Path, help="a model's config.json (default: the tiny V3 with V3's heads)")
    parser.add_argument("--json", type=Path, help="write the figures as JSON too")
    parser.add_argument("--one", nargs=4, metavar=("DEVICE", "DTYPE", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        device, dtype, model, out = options.one
        if device == "make":
            make_weights(Path(model))
        else:
            np.savez(out, allow_pickle=False, **compute(Path(model), device, dtype))
        return 0
    try:
        rows = compare(options.device, options.dtypes, config=options.config)
    except subprocess.CalledProcessError as error:
        print(f"compare_devices: {' '.join(error.cmd[-4:-2])} failed:\n{error.stderr[-4000:]}", file=sys.stderr)
        return 1
    print(as_table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(device: str, dtypes: list[str], *, config: Path | None = None) -> list[dict[str, Any]]:
    """The base's row, then one for each precision on `device`. Raises CalledProcessError with what a process said."""
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        write_config(model, config)
        environment = dict(os.environ) | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

        def start(place: str, dtype: str) -> dict[str, np.ndarray]:
            out = Path(scratch, "found.npz")
            command = [sys.executable, __file__, "--one", place, dtype, str(model), str(out)]
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            return {} if place == "make" else dict(np.load(out))

        start("make", "fp32")
        runs = [("cpu", "fp32"), *((device, dtype) for dtype in dtypes)]
        found = [start(place, dtype) for place, dtype in runs]
    return [
        {"device": place, "dtype": dtype, **beside(own, found[0])}
        for (place, dtype), own in zip(runs, found, strict=True)
    ]


def write_config(model: Path, config: Path | None) -> None:
    """MODEL/config.json with the tiny V3's tokenizer beside it, which exported folders carry on."""
    fields = json.loads((config or TINY_V3 / "config.json").read_text(encoding="utf-8"))
    model.mkdir()
    (model / "config.json").write_text(json.dumps(fields | ({} if config else HEADS)), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((TINY_V3 / name).read_bytes())


def build(model: Path, device: str, dtype: str, initialise: str) -> Any:
    """The policy of a folder on one rank, Transformer Engine's modules on a GPU that has it."""
    from megatron_r1.policy.platform import configure_process

    configure_process(threads=len(os.sched_getaffinity(0)), cpu=device == "cpu")
    import torch

    from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
    from megatron_r1.config.packages import has_module
    from megatron_r1.config.shape import load_shape
    from megatron_r1.policy import topology
    from megatron_r1.policy.policy import Policy

    topology.initialise(ParallelConfig(), seed=1, cpu=device == "cpu")
    return Policy(
        load_shape(model),
        parallel=ParallelConfig(),
        train=TrainConfig(dtype=dtype),  # pyright: ignore[reportArgumentType]
        model=ModelConfig(path=model, initialise=initialise),  # pyright: ignore[reportArgumentType]
        optimizer=OptimizerConfig(distributed=False),
        total_steps=1,
        device=torch.device(device),
        transformer_engine=device == "cuda" and has_module("transformer_engine"),
    )


def make_weights(model: Path) -> None:
    """MODEL/model.safetensors, f32: random, matrices three times as large as initial ones."""
    policy = build(model, "cpu", "fp32", "random")
    import torch
    from safetensors.torch import save_file

    stream = policy.weights(dtype=torch.float32, include_mtp=True)
    tensors = {name: tensor * 3.0 if tensor.dim() > 1 else tensor.clone() for name, tensor in stream}
    save_file(tensors, model / "model.safetensors")


def compute(model: Path, device: str, dtype: str) -> dict[str, np.ndarray]:
    """Logprobs f32 of all trained tokens, loss and gradient norm of a step, and the gradient by parameter."""
    policy = build(model, device, dtype, "weights")
    from megatron_r1.algorithms import GRPO
    from megatron_r1.algorithms.kl import KL
    from megatron_r1.data.packing import RowLayout, pack
    from megatron_r1.stages.grpo.loss import policy_loss

    rows = pack(sequences(policy.shape.vocab_size), RowLayout(tokens_per_microbatch=ROW_TOKENS), num_ranks=1)[0]
    masks = np.concatenate([row.loss_mask[0] for row in rows])
    found = {"logprobs": np.concatenate(policy.logprobs(rows))[masks]}
    loss = policy_loss(GRPO(kl=KL(coef=0.05)), own_is_old=False)
    gradients = policy.gradients(rows, loss)
    found |= {f"gradient:{name}": value.float().cpu().numpy() for name, value in gradients.items()}
    result = policy.step(rows, loss)
    return found | {"loss": np.array(result.loss), "grad_norm": np.array(result.grad_norm)}


def sequences(vocab_size: int) -> list:
    """Random sequences with what a rollout adds to them: advantages of both signs, and old, reference and behaviour
    logprobs near those of a uniform guess, so that clip, KL and correction all act."""
    from megatron_r1.types import TrainingSequence

    chance = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        mask = np.arange(length) >= PROMPT
        guess = [
            np.where(mask, chance.normal(-np.log(vocab_size), 0.3, length), 0).astype(np.float32) for _ in range(3)
        ]
        made.append(
            TrainingSequence(
                token_ids=chance.integers(3, vocab_size, length).astype(np.int32),
                loss_mask=mask,
                token_weight=np.where(mask, 1.0 / (len(LENGTHS) * mask.sum()), 0.0).astype(np.float32),
                advantage=float(chance.normal()),
                old_logprobs=guess[0],
                reference_logprobs=guess[1],
                behaviour_logprobs=guess[2],
            )
        )
    return made


def beside(own: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, float]:
    """How far `own` is from `base`: of the gradient |own - base| / |base| over all parameters as one vector."""
    names = [name for name in base if name.startswith("gradient:")]
    if set(names) != {name for name in own if name.startswith("gradient:")}:
        raise ValueError("the two models have other parameters")
    apart = sum(float(np.square(own[name].astype(np.float64) - base[name]).sum()) for name in names)
    whole = sum(float(np.square(base[name].astype(np.float64)).sum()) for name in names)
    logprobs = np.abs(own["logprobs"].astype(np.float64) - base["logprobs"])
    return {
        "loss": float(own["loss"]),
        "grad_norm": float(own["grad_norm"]),
        "logprob_mean": float(logprobs.mean()),
        "logprob_max": float(logprobs.max()),
        "gradient": float(np.sqrt(apart / whole)),
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {row['device']} | {row['dtype']} | {row['loss']:.6f} | {row['grad_norm']:.5f} | "
        f"{row['logprob_mean']:.2e}, {row['logprob_max']:.2e} | {row['gradient']:.2e} |"
        for row in rows
    ]
    return "\n".join([TABLE, *lines])


if __name__ == "__main__":
    raise SystemExit(main())
