"""Worker: exports where the disk takes no more (here: where files may not grow), on one rank.

usage: export.py STORE ROOT; ROOT holds a model folder. Writes ROOT/../said.txt, the error of the export that failed.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import torch  # noqa: E402
from trainer import groups, policy_of  # noqa: E402

from megatron_r1.errors import CheckpointError  # noqa: E402
from megatron_r1.weights.save import save_hf_folder  # noqa: E402


def main(store: str, root: Path) -> None:
    said = []
    with groups(store) as parallel:
        policy = policy_of(root, parallel)
        save_hf_folder(policy.weights(dtype=torch.float32), root, root.parent / "first")
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, unlimited[1]))
        try:
            save_hf_folder(policy.weights(dtype=torch.float32), root, root.parent / "second")
        except CheckpointError as error:
            said.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    (root.parent / "said.txt").write_text("\n".join(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
