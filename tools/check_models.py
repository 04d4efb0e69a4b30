"""Try every published model at a tiny width, and write docs/models.md.

    python tools/check_models.py [NAME ...]      print the table (NAME: part of a model's name)
    python tools/check_models.py --serve         also ask a vLLM server of each for logprobs (half a minute each)
    python tools/check_models.py --serve --write docs/models.md, all of it
    python tools/check_models.py --fields        only the lists of fields in docs/models.md (no model runs)

The models are transformers' own with random weights, of the published config.json narrowed by published_models.tiny.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from model_fields import fields_text
from published_models import PUBLISHED, tiny

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
TOKENIZER = ROOT / "megatron_r1" / "recipes" / "tiny_v3"
TOKENS = 96
LEARNING_RATE = 1e-3
NOT_RUN = "not run"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        return worker(options.worker)
    if options.fields:
        write_page(None)
        return 0
    chosen = {
        name: config
        for name, config in PUBLISHED.items()
        if not options.names or any(each.lower() in name.lower() for each in options.names)
    }
    with tempfile.TemporaryDirectory() as root:
        table = rows(check(chosen, Path(root), serve=options.serve))
    print(table)
    if options.write:
        write_page(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--fields", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def check(chosen: dict[str, dict[str, Any]], root: Path, *, serve: bool) -> dict[str, dict[str, Any]]:
    """What was found of each model, by name. Models whose narrow forms are the same are tried once."""
    folders: dict[str, Path] = {}
    for name, config in chosen.items():
        narrow = tiny(config)
        folder = root / hashlib.sha256(json.dumps(narrow, sort_keys=True).encode()).hexdigest()[:12]
        folders[name] = folder
        if not folder.exists():
            make(narrow, folder)
    done = subprocess.run([sys.executable, __file__, "--worker", str(root)], check=False)
    if done.returncode:
        raise SystemExit(f"check_models: the worker ended with {done.returncode}; its words are above")
    found: dict[Path, dict[str, Any]] = {}
    for name, folder in folders.items():
        if folder not in found:
            found[folder] = judge(folder, serve=serve)
        print(f"{name}: {found[folder]}", file=sys.stderr, flush=True)
    return {name: {"architecture": chosen[name]["model_type"]} | found[folder] for name, folder in folders.items()}


def make(config: dict[str, Any], folder: Path) -> None:
    """FOLDER/model, a Hugging Face folder with random fp32 weights; FOLDER/expected.npy, transformers' logits f32[S, V]
    of FOLDER/ids.npy i64[S]. Weights are far enough from 0 that every field shows."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from megatron_r1.config.architectures import architecture_of

    given: str = config["model_type"]
    architecture = architecture_of(given)
    known = architecture.name if architecture is not None else given
    made = CONFIG_MAPPING[known].from_dict(json.loads(json.dumps(config | {"model_type": known})))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
            elif name.endswith("bias"):
                tensor.copy_(0.1 * torch.randn_like(tensor))
            elif "inv_freq" not in name:
                tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
    ids = np.random.default_rng(0).integers(8, config["vocab_size"], size=TOKENS)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    model.save_pretrained(folder / "model")
    if config.get("num_nextn_predict_layers"):
        _add_mtp(folder / "model" / "model.safetensors", config)
    (folder / "model" / "config.json").write_text(json.dumps(config, indent=1))
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    np.save(folder / "ids.npy", ids)
    np.save(folder / "expected.npy", logits)


def _add_mtp(file: Path, config: dict[str, Any]) -> None:
    """One multi-token-prediction layer, which transformers does not have: like the last layer, as DeepSeek names it."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, hidden = load_file(file), config["hidden_size"]
    last, layer = config["num_hidden_layers"] - 1, config["num_hidden_layers"]
    for name in [name for name in weights if name.startswith(f"model.layers.{last}.")]:
        weights[name.replace(f".{last}.", f".{layer}.", 1)] = weights[name] + 0.01 * torch.randn_like(weights[name])
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden)
    weights[f"model.layers.{layer}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden) / (2 * hidden) ** 0.5
    weights[f"model.layers.{layer}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights[f"model.layers.{layer}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})


def worker(root: Path) -> int:
    """Of every FOLDER in `root`: Megatron's logits (FOLDER/found.npy) and a training step (FOLDER/trained.json), fp32,
    one rank. In a process of its own: the CPU platform's changes to torch are not for transformers."""
    from megatron_r1.policy.platform import configure_process

    configure_process(threads=2, cpu=True)
    from megatron_r1.config import ParallelConfig
    from megatron_r1.policy import topology

    with tempfile.TemporaryDirectory() as store:
        topology.initialise(ParallelConfig(), seed=0, cpu=True, store_path=f"{store}/store")
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            (folder / "trained.json").write_text(json.dumps(_train(folder)))
        topology.finalise()
    return 0


def _train(folder: Path) -> dict[str, float]:
    import torch

    from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig, load_shape
    from megatron_r1.data.packing import RowLayout, pack_rank
    from megatron_r1.policy.policy import Policy
    from megatron_r1.stages.sft.loss import mean_loss, sft_loss
    from megatron_r1.types import TrainingSequence

    shape = load_shape(folder / "model")
    policy = Policy(
        shape,
        parallel=ParallelConfig(),
        train=TrainConfig(dtype="fp32"),
        model=ModelConfig(path=folder / "model", train_mtp=shape.num_mtp_layers > 0),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, min_lr=LEARNING_RATE, distributed=False),
        total_steps=1,
        device=torch.device("cpu"),
    )
    ids = np.load(folder / "ids.npy")
    given = torch.from_numpy(ids)[None]
    with torch.no_grad():
        logits = policy.chunks[0].eval()(given, torch.arange(given.shape[1])[None], None)
    np.save(folder / "found.npy", logits[0, :, : shape.vocab_size].float().numpy())
    mask = np.arange(len(ids)) >= 1
    weight = (mask / mask.sum()).astype(np.float32)
    batch = [TrainingSequence(token_ids=ids.astype(np.int32), loss_mask=mask, token_weight=weight)]
    layout = RowLayout(tokens_per_microbatch=TOKENS, row_multiple=2)
    before = mean_loss(policy, batch, layout)
    step = policy.step(pack_rank(batch, layout, rank=0, num_ranks=1), sft_loss)
    return {"before": before, "after": mean_loss(policy, batch, layout), "norm": step.grad_norm}


def judge(folder: Path, *, serve: bool) -> dict[str, Any]:
    """What is to be said of one tiny model: numbers, and whether its files came back bit for bit."""
    expected, found = np.load(folder / "expected.npy"), np.load(folder / "found.npy")
    result: dict[str, Any] = {
        "difference": float(np.abs(found - expected).max()),
        "largest": float(abs(expected).max()),
    }
    result |= json.loads((folder / "trained.json").read_text())
    result["returns"] = _returns(folder)
    if serve:
        result["served"] = _served(folder, found)
    return result


def _returns(folder: Path) -> bool:
    """Whether every tensor comes back from Megatron's form with its name, dtype and bytes."""
    from safetensors.torch import load_file

    from megatron_r1.weights.convert import ConvertOptions, convert

    convert(folder / "model", folder / "megatron", ConvertOptions(target="torch_dist", workers=1))
    convert(folder / "megatron", folder / "back", ConvertOptions(target="hf", workers=1))
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "back"))
    return before.keys() == after.keys() and all(
        tensor.dtype == after[name].dtype and tensor.numpy().tobytes() == after[name].numpy().tobytes()
        for name, tensor in before.items()
    )


def _served(folder: Path, logits: np.ndarray) -> float | str:
    """Largest difference of vLLM's logprobs of the tokens to Megatron's; why there is none."""
    from megatron_r1.config import RolloutConfig, SamplingConfig
    from megatron_r1.engines.vllm.server import start_engines
    from megatron_r1.errors import UserError

    config = RolloutConfig(
        device="cpu", sync="gloo", dtype="fp32", max_model_len=128, max_num_seqs=4, memory_fraction=0.3,
        kv_cache_gib=0.25, enforce_eager=True, start_timeout_seconds=300, sampling=SamplingConfig(max_new_tokens=16),
    )  # fmt: skip
    ids = np.load(folder / "ids.npy")
    logprobs = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
    try:
        (engine,) = start_engines(config, model_path=folder / "model", run_dir=folder)
        with engine:
            said = engine.client.score([int(each) for each in ids])[1:]
    except UserError as error:
        return f"does not start: {str(error).strip().splitlines()[-1][:200]}"
    return float(np.abs(said - logprobs[np.arange(len(ids) - 1), ids[1:]]).max())


# ---- the page


def rows(found: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        "| published model | model_type | logits beside transformers | one training step: loss, gradient norm "
        "| Megatron's form and back | vLLM's logprobs beside Megatron's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in found.items():
        trained = np.isfinite([each["before"], each["after"], each["norm"]]).all() and each["norm"] > 0
        step = f"{each['before']:.2f} to {each['after']:.2f}, {each['norm']:.2g}" + ("" if trained else " (WRONG)")
        served = each.get("served", NOT_RUN)
        difference = f"{each['difference']:.1e}" if each["difference"] else "0 (the same bits)"
        lines.append(
            f"| {name} | {each['architecture']} | {difference} of {each['largest']:.1f} | {step} "
            f"| {'bit for bit' if each['returns'] else 'NOT EQUAL'} "
            f"| {served if isinstance(served, str) else f'{served:.1e}'} |"
        )
    return "\n".join(lines)


def write_page(table: str | None) -> None:
    """docs/models.md anew: the table (None: the one that it has), and the lists of fields."""
    text = PAGE.read_text(encoding="utf-8")
    if table is not None:
        text = _between(text, "table", table)
    PAGE.write_text(_between(text, "fields", fields_text()), encoding="utf-8")


def _between(text: str, name: str, content: str) -> str:
    """`text` with `content` between its marks of that name."""
    begin, end = f"<!-- {name}: tools/check_models.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"check_models: {PAGE} has no {begin}; take the page from the repository")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


if __name__ == "__main__":
    sys.exit(main())
