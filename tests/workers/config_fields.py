"""Worker, one rank: the logits of many tiny models, each built as config.json says.

usage: config_fields.py STORE ROOT; ROOT/NAME holds a Hugging Face folder; ROOT/ids.npy i64[S]; writes ROOT/found.npz,
f32[S, V] by name, or ROOT/NAME/error.txt.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_r1.config import ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.model.build import build_model_chunks  # noqa: E402
from megatron_r1.model.transformer_config import transformer_config  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.weights.load import load_weights  # noqa: E402
from megatron_r1.weights.local import local_tensors  # noqa: E402
from megatron_r1.weights.table import build_table  # noqa: E402


def logits(folder: Path, ids: torch.Tensor) -> np.ndarray:
    """[S, V]; without MTP layers, which logits do not meet and transformers does not save."""
    shape = load_shape(folder)
    config = transformer_config(shape, ParallelConfig(), TrainConfig(dtype="fp32"), transformer_engine=False)
    (model,) = build_model_chunks(shape, config, transformer_engine=False)
    load_weights(local_tensors([model], build_table(shape)), folder)
    with torch.no_grad():
        return model.eval()(ids, torch.arange(ids.shape[1])[None], None)[0].numpy()


def main(store: str, root: Path) -> None:
    topology.initialise(ParallelConfig(), seed=1, cpu=True, store_path=store)
    ids = torch.from_numpy(np.load(root / "ids.npy"))[None]
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        try:
            found[folder.name] = logits(folder, ids)
        except Exception:
            (folder / "error.txt").write_text(traceback.format_exc())
    np.savez(root / "found.npz", **found)
    topology.finalise()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
