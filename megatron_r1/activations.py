"""What a recording of one forward pass holds, and under which names: the trainer's and the engine's side agree on them.

A recording is a safetensors file of one prompt of T tokens. Its tensors are named after Hugging Face's modules, so that
`weights_of` can say which weights make a module's output:

| name | shape | what |
| --- | --- | --- |
| model.embed_tokens | [T, H] | output |
| model.layers.N.input | [T, H] | the hidden state before the layer |
| model.layers.N.input_layernorm | [T, H] | output |
| model.layers.N.self_attn | [T, H] | output, before it is added |
| model.layers.N.middle | [T, H] | the hidden state after attention was added |
| model.layers.N.post_attention_layernorm | [T, H] | output |
| model.layers.N.mlp.gate | [T, E] | logits of the router |
| model.layers.N.mlp.experts | i32 [T, K] | the experts of each token, in any order |
| model.layers.N.mlp | [T, H] | output, before it is added |
| model.norm.input | [T, H] | the hidden state after the last layer |
| model.norm | [T, H] | output |
| lm_head | [R, V] | logits of the first R positions |
| logprobs | f32 [T] | log p(token i given those before it), entry 0 zero |
| token_ids | i64 [T] | the prompt |

Activations have the model's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDING, NORM_INPUT, NORM, HEAD = "model.embed_tokens", "model.norm.input", "model.norm", "lm_head"
LOGPROBS, TOKEN_IDS = "logprobs", "token_ids"
INPUT, MIDDLE = "input", "middle"
INPUT_NORM, ATTENTION, MIDDLE_NORM, MLP = "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"
GATE, EXPERTS = "mlp.gate", "mlp.experts"
PARTS = (INPUT_NORM, ATTENTION, MIDDLE_NORM, GATE, EXPERTS, MLP)
"""A layer's modules, in the order in which they run."""

HEAD_POSITIONS = 16
"""Positions whose logits are recorded, at most: a row of them is the whole vocabulary."""

_OWN_WEIGHTS = {
    GATE: (r"mlp\.gate\.weight",),
    EXPERTS: (r"mlp\.gate\.e_score_correction_bias",),
    MLP: (r"mlp\.(?!gate\.)",),
}


def layer_part(layer: int, part: str) -> str:
    """`part` (INPUT, ATTENTION, ...) of decoder layer `layer` (from 0) as recordings call it."""
    return f"model.layers.{layer}.{part}"


def split_part(name: str) -> tuple[int, str] | None:
    """(layer, part) of a name that `layer_part` gave; None for what is in no layer."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else None


def weights_of(name: str, hf_names: Iterable[str]) -> list[str]:
    """Those of a model's Hugging Face tensors that `name`'s output is made of, beside its input. A tied head has none
    of its own: give the embedding's name for it."""
    found = split_part(name)
    if found is None:
        return [hf for hf in hf_names if hf.startswith(f"{name}.")]
    layer, part = found
    patterns = [rf"model\.layers\.{layer}\.{own}" for own in _OWN_WEIGHTS.get(part, (re.escape(part) + r"\.",))]
    return [hf for hf in hf_names if any(re.match(pattern, hf) for pattern in patterns)]
