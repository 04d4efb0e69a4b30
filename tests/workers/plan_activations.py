"""Worker: bytes that autograd saves in a forward pass, and the peak of the chunked head's backward pass.

usage: plan_activations.py STORE FILE; FILE is JSON, {parallel, cases: [{config, dtype, recompute, tokens,
chunk_tokens}]}; rank r writes FILE with the suffix .r.out, {saved, chunk_peak} for each case. `saved` counts every
storage once, parameters excluded (torch.autograd.graph.saved_tensors_hooks); `chunk_peak` is the most that torch's
profiler saw allocated at once in forward and backward of one chunk of the head, above what was there before (on one
rank only).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import torch  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

from megatron_r1.config import ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import shape_from_config  # noqa: E402
from megatron_r1.model.build import build_model_chunks  # noqa: E402
from megatron_r1.model.logprob import chunked_logprob_entropy  # noqa: E402
from megatron_r1.model.transformer_config import transformer_config  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402


def main(store: str, file: Path) -> None:
    request = json.loads(file.read_text())
    parallel = ParallelConfig(**request["parallel"])
    topology.initialise(parallel, seed=1, cpu=True, store_path=store)
    found = []
    for case in request["cases"]:
        found.append({"saved": saved(case, parallel)})
        if parallel.world_size == 1:
            found[-1]["chunk_peak"] = chunk_peak(case)
    file.with_suffix(f".{topology.rank()}.out").write_text(json.dumps(found))
    topology.finalise()


def saved(case: dict, parallel: ParallelConfig) -> int:
    shape, tokens = shape_from_config(case["config"]), case["tokens"]
    train = TrainConfig(dtype=case["dtype"], recompute=case["recompute"])
    config = transformer_config(shape, parallel, train, transformer_engine=False)
    chunks = build_model_chunks(shape, config, transformer_engine=False, logprob_chunk_tokens=case["chunk_tokens"])
    model = chunks[0].train()
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in held:
            kept[place] = tensor  # alive, so that no other storage gets its address
        return tensor

    ids = torch.randint(0, shape.vocab_size, (1, tokens))
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=tokens, max_seqlen_kv=tokens
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, torch.arange(tokens)[None], None, labels=ids, packed_seq_params=packed)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def chunk_peak(case: dict) -> int:
    shape, count = shape_from_config(case["config"]), case["chunk_tokens"]
    dtype = torch.float32 if case["dtype"] == "fp32" else torch.bfloat16
    # The head alone, as wide as a real vocabulary is next to the hidden size.
    hidden = torch.randn(2 * count, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape.vocab_size * 64, 8, dtype=dtype, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    labels = torch.randint(0, shape.vocab_size, (2 * count,))
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        logprobs, entropy = chunked_logprob_entropy(
            hidden, weight, labels, vocab_size=weight.shape[0], chunk_tokens=count, temperature=1.0
        )
        (logprobs.sum() + 0.0 * entropy.sum()).backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
