"""torch_dist checkpoints that are damaged, stale or hostile, and manifests that are: an error, never wrong weights."""

import io
import json
import pickle
import shutil
import struct
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from oracles import save_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_r1.errors import CheckpointError
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.folders import check_kind, open_checkpoint, read_shape
from megatron_r1.weights.manifest import MANIFEST
from megatron_r1.weights.torch_dist_metadata import read_metadata
from megatron_r1.weights.verify import compare

TO_MEGATRON = ConvertOptions(target="torch_dist", workers=1)
TO_HF = ConvertOptions(target="hf", workers=1)
KEY = "decoder.layers.0.mlp.linear_fc2.weight"
SMALLER = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    save_model("deepseek_v3", folder / "hf")
    convert(folder / "hf", folder / "megatron", TO_MEGATRON)
    return folder


@pytest.fixture
def megatron(made, tmp_path):
    return shutil.copytree(made / "megatron", tmp_path / "megatron")


def stored_metadata(folder):
    """Our own, which is trusted here."""
    return pickle.loads((folder / ".metadata").read_bytes())


def rewrite(folder, change):
    metadata = stored_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def refused(folder, words):
    """Exporting raises an error of `words` and leaves nothing."""
    with pytest.raises(CheckpointError, match=words):
        convert(folder, folder.parent / "out", TO_HF)
    assert not (folder.parent / "out").exists()


class Touch:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


# ---- pickles


def test_a_hostile_metadata_runs_nothing(megatron, tmp_path):
    rewrite(megatron, lambda metadata: setattr(metadata, "planner_data", Touch(tmp_path / "touched")))
    open_checkpoint(megatron, read_shape(megatron)).close()  # what it would have made is not needed
    assert not (tmp_path / "touched").exists()
    (megatron / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    refused(megatron, "not the metadata")
    assert not (tmp_path / "touched").exists()
    pickle.loads((megatron / ".metadata").read_bytes())
    assert (tmp_path / "touched").exists()  # the trap works


def test_a_pickle_cannot_change_torchs_classes(megatron):
    """BUILD with a class in the place of an object sets the class's attributes."""
    good = (megatron / ".metadata").read_bytes()
    build = b"\x80\x04ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n(N}X\x04\x00\x00\x00sizeK\x01stb0"
    (megatron / ".metadata").write_bytes(build + good[2:])
    read_metadata(megatron)
    assert not hasattr(dcp.TensorStorageMetadata, "size")
    pickle.loads((megatron / ".metadata").read_bytes())
    assert dcp.TensorStorageMetadata.size == 1  # the trap works
    del dcp.TensorStorageMetadata.size


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\x80\x04garbage", pickle.dumps([]), pickle.dumps({}),
     b"\x80\x04\x8e" + struct.pack("<Q", 2**62), b"(" * 100, b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."],
    ids=["empty", "text", "cut", "list", "dict", "oversized", "marks", "nested"],
)  # fmt: skip
def test_a_metadata_that_is_none(megatron, content):
    (megatron / ".metadata").write_bytes(content)
    refused(megatron, "not the metadata of a torch_dist checkpoint")


# ---- metadata that lies


def items_of(metadata, key):
    return [index for index in metadata.storage_data if index.fqn == key]


def place(**fields):
    """Change where KEY's item is said to lie."""

    def change(metadata):
        (index,) = items_of(metadata, KEY)
        old = vars(metadata.storage_data[index])
        metadata.storage_data[index] = _StorageInfo(**({"transform_descriptors": None} | old | fields))

    return change


def tensor(**fields):
    def change(metadata):
        vars(metadata.state_dict_metadata[KEY]).update(fields)

    return change


def other_dtype(dtype):
    return lambda metadata: setattr(metadata.state_dict_metadata[KEY].properties, "dtype", dtype)


def item_of(key):
    def change(metadata):
        metadata.storage_data[items_of(metadata, KEY)[0]] = metadata.storage_data[items_of(metadata, key)[0]]

    return change


def split(*chunks):
    """Let KEY be chunks (first row, rows), all stored as its one item."""

    def change(metadata):
        stored, (index,) = metadata.state_dict_metadata[KEY], items_of(metadata, KEY)
        item = metadata.storage_data.pop(index)
        stored.chunks = []
        for number, (row, rows) in enumerate(chunks):
            offsets, sizes = torch.Size([row, 0]), torch.Size([rows, stored.size[1]])
            stored.chunks.append(dcp.ChunkStorageMetadata(offsets, sizes))
            metadata.storage_data[dcp.MetadataIndex(KEY, offsets, number)] = item

    return change


def no_dimensions(metadata):
    (index,) = items_of(metadata, KEY)
    metadata.storage_data[dcp.MetadataIndex(KEY, torch.Size([]), 0)] = metadata.storage_data.pop(index)
    metadata.state_dict_metadata[KEY].chunks = [dcp.ChunkStorageMetadata(torch.Size([]), torch.Size([]))]


@pytest.mark.parametrize(
    "change,words",
    [
        (item_of("embedding.word_embeddings.weight"), r"the item is torch\.float32\[101, 64\], its metadata says"),
        (item_of(SMALLER), r"the item is torch\.float32\[64\], its metadata says"),
        (other_dtype(torch.float16), r"the item is torch\.float32.*its metadata says torch\.float16"),
        (other_dtype(torch.int32), "weights must be bf16"),
        (other_dtype(5), "not described as torch does it"),
        (tensor(properties=None), "not described as torch does it"),
        (tensor(chunks=5), "not described as torch does it"),
        (tensor(size=[64, 128]), "not described as torch does it"),
        (no_dimensions, "not described as torch does it"),
        (split((0, 32), (1, 32)), "items that overlap"),
        (split((0, 32)), "not there as a whole"),
        (split((0, 65)), "has a chunk outside of it"),
        (split((0, 32), (32, 32)), "the item is"),
        (place(offset=-10), "lies nowhere"),
        (place(length=-10), "lies nowhere"),
        (place(offset="a"), "lies nowhere"),
        (place(length=3000), "truncated or damaged"),
        (place(length=10**12), "truncated"),
        (place(relative_path=3), "outside the folder"),
        (place(relative_path="../secret.distcp"), "outside the folder"),
        (place(relative_path="a\0b"), "does not exist"),
        (lambda metadata: setattr(metadata, "storage_data", {1: 2}), "an item has no key"),
        (lambda metadata: setattr(metadata, "storage_data", None), "not the metadata"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", None), "not the metadata"),
        (lambda metadata: metadata.storage_data.pop(items_of(metadata, KEY)[0]), "not there as a whole"),
        (lambda metadata: metadata.state_dict_metadata.pop(KEY), "is missing"),
    ],
)
def test_metadata_that_lies(megatron, change, words):
    rewrite(megatron, change)
    refused(megatron, words)


@pytest.mark.parametrize("content", [{"a": torch.zeros(64, 128)}, torch.zeros(128, 64).T, torch.zeros(64, 64, 128)[1]])
def test_an_item_that_is_no_plain_tensor(megatron, tmp_path, content):
    file = io.BytesIO()
    torch.save(content, file)
    (megatron / "other.distcp").write_bytes(file.getvalue())
    rewrite(megatron, place(relative_path="other.distcp", offset=0, length=len(file.getvalue())))
    refused(megatron, r"holds a dict|order that is not supported|the item is")


def test_a_hostile_item_runs_nothing(megatron, tmp_path):
    file = io.BytesIO()
    torch.save(Touch(tmp_path / "touched"), file)
    (megatron / "other.distcp").write_bytes(file.getvalue())
    rewrite(megatron, place(relative_path="other.distcp", offset=0, length=len(file.getvalue())))
    refused(megatron, r"other\.distcp: key")
    assert not (tmp_path / "touched").exists()


def test_a_cut_or_missing_data_file(megatron):
    file = megatron / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5000])
    refused(megatron, r"__0_0\.distcp: truncated")
    file.unlink()
    refused(megatron, r"__0_0\.distcp: does not exist")


def test_another_models_config(megatron):
    config = json.loads((megatron / "hf" / "config.json").read_text())
    for fields, words in (({"num_hidden_layers": 5}, "is missing"), ({"moe_intermediate_size": 31}, "has shape")):
        (megatron / "hf" / "config.json").write_text(json.dumps(config | fields))
        refused(megatron, words)


# ---- manifests


def test_a_flipped_bit_is_found_by_the_manifest(megatron, tmp_path):
    file = megatron / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    item = stored_metadata(megatron).storage_data[items_of(stored_metadata(megatron), KEY)[0]]
    data[item.offset + item.length // 2] ^= 1
    file.write_bytes(data)
    refused(megatron, rf"mlp\.down_proj\.weight is not what {MANIFEST} says: the data is damaged")
    shutil.rmtree(tmp_path / "out.partial")
    convert(megatron, tmp_path / "out", ConvertOptions(target="hf", precision="bf16"))  # of which it says nothing
    (megatron / MANIFEST).unlink()
    shutil.rmtree(tmp_path / "out")
    convert(megatron, tmp_path / "out", TO_HF)


def test_a_flipped_bit_in_a_converted_hugging_face_folder(made, tmp_path):
    convert(made / "megatron", tmp_path / "hf", TO_HF)
    file = tmp_path / "hf" / "model.safetensors"
    save_file({name: t + (name == "model.norm.weight") for name, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not what"):
        convert(tmp_path / "hf", tmp_path / "out", TO_MEGATRON)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "[" * 200_000, '{"tensors": {}}', '{"aliases": [1], "tensors": {}}',
     '{"aliases": {"a": []}, "tensors": {}}', '{"aliases": {}, "tensors": [1]}', '{"aliases": {}, "tensors": {"a": 1}}',
     '{"aliases": {}, "tensors": {"a": {"dtype": "", "shape": 3, "xxh3_128": "", "nonfinite": 0}}}'],
)  # fmt: skip
def test_manifests_that_are_none(megatron, content, capsys):
    (megatron / MANIFEST).write_text(content)
    refused(megatron, MANIFEST)
    assert convert_checkpoint.main(["inspect", str(megatron)]) == 2
    assert MANIFEST in capsys.readouterr().err


@pytest.mark.parametrize(
    "alias,name",
    [("lm_head.weight", "model.embed_tokens.weight"), ("../../x", "model.embed_tokens.weight"),
     ("model.layers.4.embed_tokens.weight", "lm_head.weight")],
)  # fmt: skip
def test_a_manifest_cannot_replace_or_invent_tensors(megatron, alias, name):
    manifest = json.loads((megatron / MANIFEST).read_text())
    (megatron / MANIFEST).write_text(json.dumps(manifest | {"aliases": {alias: name}}))
    refused(megatron, f"{MANIFEST}: calls .* a copy of {name}, which it is not")


# ---- the tied head


def tied(folder, change):
    save_model("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_tied_head_that_holds_the_same_nan_is_the_same(tmp_path):
    def change(tensors):
        tensors["model.embed_tokens.weight"][0, 0] = torch.nan
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    hf = tied(tmp_path / "hf", change)
    convert(hf, tmp_path / "out", ConvertOptions(target="torch_dist", workers=1, allow_nonfinite=True))
    assert compare(hf, tmp_path / "out").equal


def test_a_tied_head_of_another_dtype_is_another(tmp_path):
    def change(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()

    with pytest.raises(CheckpointError, match=r"lm_head\.weight is torch\.float32 and .* torch\.bfloat16"):
        convert(tied(tmp_path / "hf", change), tmp_path / "out", TO_MEGATRON)


# ---- folders of another kind


def test_folders_of_another_kind(megatron, tmp_path, capsys):
    (megatron / "hf" / "config.json").unlink()
    refused(megatron, r"without the model's config\.json; put that .* into .*/megatron/hf")
    root = tmp_path / "root"
    (root / "iter_0000010").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(CheckpointError, match=r"where Megatron saves: give one checkpoint in it \(iter_0000010\)"):
        read_shape(root)
    binary = tmp_path / "binary"
    binary.mkdir()
    (binary / "pytorch_model.bin").touch()
    (binary / "config.json").write_text("{}")
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "model.safetensors").touch()
    for folder, wanted, words in (
        (root, "torch_dist", r"holds no \.metadata.*iter_0000010"),
        (binary, "torch_dist", r"holds no \.metadata"),
        (hf, "torch_dist", "the commands for that are hf-to-megatron and hf-to-hf"),
        (megatron, "hf", "the command for that is megatron-to-hf"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_kind(folder, wanted)
