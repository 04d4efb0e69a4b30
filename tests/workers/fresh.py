"""Worker: what a vLLM engine that was started on an exported folder says of fixed sequences.

usage: fresh.py SEQUENCES.npz FOLDER... Writes FOLDER/fresh.npz: for array i of SEQUENCES, the logprob of each token but
the first (0 there). One process for all folders, because most of an engine's start is imports; each has an engine
of its own, with the settings of our servers (engines/vllm/command.py).
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from sync import ROLLOUT

from megatron_r1.engines.vllm.command import CPU_BLOCK_SIZE, CPU_CUSTOM_OPS, server_environment


def main(sequences: Path, folders: list[Path]) -> None:
    with np.load(sequences) as stored, tempfile.TemporaryDirectory() as private:
        fixed = [stored[name].tolist() for name in stored.files]
        os.environ |= server_environment(
            ROLLOUT, base=os.environ, model_path=folders[0], host="127.0.0.1", token="", private_dir=Path(private),
            visible_devices=None,
        )  # fmt: skip
        for folder in folders:
            np.savez(folder / "fresh.npz", *score(folder, fixed))
            gc.collect()


def score(folder: Path, fixed: list[list[int]]) -> list[np.ndarray]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=ROLLOUT.max_model_len,
        max_num_seqs=ROLLOUT.max_num_seqs,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=int(ROLLOUT.kv_cache_gib * 2**30),
        block_size=CPU_BLOCK_SIZE,
        compilation_config={"custom_ops": CPU_CUSTOM_OPS},
    )
    found = engine.generate(
        [{"prompt_token_ids": ids} for ids in fixed], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    return [
        np.array([0.0] + [said[token].logprob for said, token in zip(one.prompt_logprobs[1:], ids[1:], strict=True)])
        for one, ids in zip(found, fixed, strict=True)
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
