"""Worker, one rank: every architecture's logits, export, and what bad folders are refused with.

usage: architectures.py STORE ROOT; ROOT/NAME holds a Hugging Face folder and ids.npy; writes ROOT/NAME/found.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trainer import groups, policy_of  # noqa: E402

from megatron_r1.config import ParallelConfig, TrainConfig  # noqa: E402


def main(store: str, root: Path) -> None:
    with groups(store) as parallel:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            np.savez(folder / "found.npz", **measure(folder, parallel))


def measure(folder: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for dtype in ("fp32", "bf16"):
        policy = policy_of(folder, parallel, train=TrainConfig(dtype=dtype))
        ids = torch.from_numpy(np.load(folder / "ids.npy").astype(np.int64))[None]
        chunk = policy.chunks[0].eval()
        with torch.no_grad():
            logits = chunk(ids, torch.arange(ids.shape[1])[None], None)
        found[f"logits_{dtype}"] = logits[0].float().numpy()
    expected = load_file(folder / "model.safetensors")
    out = dict(policy.weights(dtype=torch.bfloat16))
    found["names_equal"] = np.array(set(out) == set(expected))
    found["bf16_export_equal"] = np.array(
        all(torch.equal(out[name].float(), expected[name].to(out[name].dtype).float()) for name in out)
    )
    return found


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
