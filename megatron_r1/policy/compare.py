"""Run a few tokens through two model folders: what is equal in bytes must be equal in logits, and more can differ.

A Hugging Face folder is run by transformers where that has its architecture, a torch_dist one by Megatron; so comparing
a folder with its conversion checks the name table itself, not one reading of it against the same reading.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_r1.config.shape import ModelShape, hf_files, load_shape
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.weights.torch_dist_metadata import is_torch_dist


@dataclass(frozen=True, slots=True)
class LogitsComparison:
    positions: int
    worst: float
    """Largest |a - b| of any logit, fp32."""
    largest: float
    """Largest |a|."""
    same_likeliest: int


def compare_logits(first: Path, second: Path, text: str) -> LogitsComparison:
    """Logits of `text` under both folders' models, fp32, one rank, on the CPU. Needs memory for one model at a time.

    Token ids come from the first folder's tokenizer; from a fixed random sequence if it has none.
    """
    shape = load_shape(first)
    ids = _token_ids(first, shape, text)
    a, b = _logits(first, ids), _logits(second, ids)
    same = int((a.argmax(-1) == b.argmax(-1)).sum())
    return LogitsComparison(len(ids), float(np.abs(a - b).max()), float(np.abs(a).max()), same)


def _token_ids(folder: Path, shape: ModelShape, text: str) -> np.ndarray:
    try:
        ids = np.asarray(load_tokenizer(hf_files(folder)).encode(text), dtype=np.int64)
    except ConfigError:
        ids = np.random.default_rng(0).integers(0, shape.vocab_size, 24)
    if not len(ids) or ids.max() >= shape.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer makes no tokens of {text!r} that the model has ({shape.vocab_size}); give "
            "another --text"
        )
    return ids[: shape.max_positions]


def _logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """[tokens, vocabulary]"""
    quantised = json.loads((hf_files(folder) / "config.json").read_text()).get("quantization_config")
    if is_torch_dist(folder) or quantised:
        return _megatron_logits(folder, ids)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)[None]).logits[0].numpy()


def _megatron_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """In a process of its own: the CPU platform's changes to torch are not for transformers."""
    with tempfile.TemporaryDirectory() as private:
        given, found = Path(private, "ids.npy"), Path(private, "logits.npy")
        np.save(given, ids)
        command = [sys.executable, "-m", "megatron_r1.policy.logits", str(folder), str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(f"{folder}: Megatron cannot run it:\n{done.stderr[-2000:]}")
        return np.load(found)
