"""Logprob and entropy of every token over a vocabulary, with their gradient: ours in chunks beside plain PyTorch.

usage: python tools/benchmark_head.py [--device cuda] [--tokens 16384] [--vocabulary 129280] [--hidden 7168]
           [--chunk-tokens 1024] [--dtype bf16] [--repeats 5] [--json OUT]

Ours is `model/logprob.py` (a chunk's logits are made again in the backward pass); plain is a product, log_softmax in
fp32 and autograd. Seconds are medians of forward and backward together, interleaved; memory (on a GPU) is the peak
above what lay there before. The last line says how far the two are apart, and which of them needed how much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_r1.model.logprob import chunked_logprob_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENTROPY_WEIGHT = 0.01
Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocabulary", type=int, default=129_280)
    parser.add_argument("--hidden", type=int, default=7_168)
    parser.add_argument("--chunk-tokens", type=int, default=1_024)
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures as JSON too")
    options = parser.parse_args()
    result = measure(
        torch.device(options.device),
        tokens=options.tokens,
        vocabulary=options.vocabulary,
        hidden=options.hidden,
        chunk_tokens=options.chunk_tokens,
        dtype=DTYPES[options.dtype],
        repeats=options.repeats,
    )
    print(as_table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(
    device: torch.device,
    *,
    tokens: int,
    vocabulary: int,
    hidden: int,
    chunk_tokens: int,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, Any]:
    """{"ours" and "plain": {seconds, peak_gib (0 on a CPU; None where memory ran out)}, "apart": largest differences
    of logprob and entropy, and of each gradient relative to its largest entry}."""
    torch.manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weight_VH = torch.randn(vocabulary, hidden, device=device, dtype=dtype) * (2.0 / hidden**0.5)
    labels_T = torch.randint(vocabulary, (tokens,), device=device)

    def ours(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor):
        return chunked_logprob_entropy(hidden_TH, weight_VH, labels_T, vocab_size=vocabulary, chunk_tokens=chunk_tokens)

    heads: dict[str, Head] = {"ours": ours, "plain": plain}
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    peaks: dict[str, int | None] = dict.fromkeys(heads, 0)
    found: dict[str, list[torch.Tensor]] = {}
    for repeat in range(repeats + 1):  # the first warms up
        for name in sorted(heads, reverse=bool(repeat % 2)):
            if peaks[name] is None:
                continue
            before = reset_peak(device)
            begun = time.perf_counter()
            try:
                values = run(heads[name], hidden_TH, weight_VH, labels_T)
            except torch.OutOfMemoryError:
                peaks[name] = None
                continue
            seconds[name].append(time.perf_counter() - begun)
            peaks[name] = max(peaks[name] or 0, peak(device) - before)
            found[name] = [value.to("cpu") for value in values] if not repeat else found[name]
            del values
    rows = {
        name: {
            "seconds": statistics.median(seconds[name][1:]) if len(seconds[name]) > 1 else None,
            "peak_gib": None if peaks[name] is None else (peaks[name] or 0) / 2**30,
        }
        for name in heads
    }
    return {"tokens": tokens, "vocabulary": vocabulary, "hidden": hidden, **rows, "apart": apart(found)}


def plain(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes first: all logits at once."""
    scores_TV = F.linear(hidden_TH, weight_VH).float().log_softmax(-1)
    return scores_TV.gather(1, labels_T[:, None])[:, 0], -(scores_TV.exp() * scores_TV).sum(-1)


def run(head: Head, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> list[torch.Tensor]:
    """Logprobs, entropies, and the gradients of hidden states and weights of a loss that needs both; all done when it
    returns."""
    hidden_TH, weight_VH = hidden_TH.detach().requires_grad_(), weight_VH.detach().requires_grad_()
    logprobs_T, entropy_T = head(hidden_TH, weight_VH, labels_T)
    loss = -logprobs_T.mean() + ENTROPY_WEIGHT * entropy_T.mean()
    gradients = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    if hidden_TH.is_cuda:
        torch.cuda.synchronize()
    return [logprobs_T.detach(), entropy_T.detach(), *gradients]


def apart(found: dict[str, list[torch.Tensor]]) -> dict[str, float] | None:
    """None where one of the two has no result."""
    if len(found) < 2:
        return None
    differences = {}
    for name, one, other in zip(
        ("logprob", "entropy", "hidden gradient", "weight gradient"), found["ours"], found["plain"], strict=True
    ):
        scale = 1.0 if name in ("logprob", "entropy") else float(other.abs().max())
        differences[name] = float((one - other).abs().max()) / scale
    return differences


def reset_peak(device: torch.device) -> int:
    """Bytes that are held now; 0 on a CPU, whose memory is not counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def as_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['tokens']:,} tokens, {result['hidden']:,} wide, vocabulary {result['vocabulary']:,}",
        "",
        "| head | seconds | peak GiB |",
        "| --- | --- | --- |",
    ]
    for name in ("ours", "plain"):
        row = result[name]
        took = "-" if row["seconds"] is None else f"{row['seconds']:.4f}"
        held = "out of memory" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        lines.append(f"| {name} | {took} | {held} |")
    if result["apart"]:
        lines += ["", "apart: " + ", ".join(f"{name} {value:.1e}" for name, value in result["apart"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
