"""Every field of config.json that vLLM's model files read is one that config/fields.py knows.

A field that vLLM alone reads makes its servers another model than the trainer's, and transformers' classes, which the
other test of fields goes by, do not have it. The names are read from vLLM's source, so that a new version's are found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.config.architectures import ARCHITECTURES
from megatron_r1.config.fields import config_fields

vllm = pytest.importorskip("vllm")
MODELS = Path(vllm.__file__).parent / "model_executor" / "models"
FILES = {
    "deepseek_v2": ("deepseek_v2",), "deepseek_v3": ("deepseek_v2", "deepseek_mtp"), "llama": ("llama",),
    "qwen2": ("qwen2",), "qwen3": ("qwen3",), "qwen3_moe": ("qwen3_moe",),
}  # fmt: skip
"""Where vLLM has the layers of an architecture."""
NO_FIELDS = {
    "model_type": "names the architecture",
    "get_text_config": "a method",
    "target_layer_count": "of a draft model, which vLLM makes itself",
    "rswa_window": "of DeepSeek's first model, whose attention has no latents",
    "index_head_dim": "beside index_topk alone", "index_n_heads": "beside index_topk alone",
    "index_skip_topk_offset": "beside index_topk alone", "index_topk_freq": "beside index_topk alone",
    "index_topk_pattern": "beside index_topk alone", "indexer_rope_interleave": "beside index_topk alone",
}  # fmt: skip
"""Names that decide nothing for the architectures here, with the reason."""
CONFIGS = ("config", "hf_config", "hf_text_config")


def fields_read(file: Path) -> Iterator[str]:
    """Names that a file reads from an object called config: config.NAME, getattr and hasattr."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            owner, name = node.args[0], getattr(node.args[1], "value", None)
        else:
            continue
        if ast.unparse(owner).rpartition(".")[2] in CONFIGS and isinstance(name, str):
            yield name


def test_every_architecture_has_its_file():
    assert FILES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fields_that_vllm_reads_are_known(architecture):
    found = {name for file in FILES[architecture] for name in fields_read(MODELS / f"{file}.py")}
    assert {"hidden_size", "rms_norm_eps", "vocab_size"} <= found, "config has another name in this version"
    known = {field.name for field in config_fields(ARCHITECTURES[architecture])}
    assert not found - known - set(NO_FIELDS), "vLLM reads new fields: say in config/ what becomes of them"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_window_that_vllm_alone_reads_is_refused(architecture):
    """vLLM gives every layer the sliding_window of transformers' class (engine/arg_utils.py). Qwen's classes take it
    back while use_sliding_window is false; the others leave it there, and transformers' own models do not look."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[architecture].from_dict({"sliding_window": 4, "use_sliding_window": False})
    (ours,) = (field for field in config_fields(ARCHITECTURES[architecture]) if field.name == "sliding_window")
    assert ours.treatment == ("without effect" if made.sliding_window is None else "limited")
