"""Which weights a server completes together: a decoder layer's, or a module's beside the layers."""

from __future__ import annotations

import re

DECODER_LAYER = re.compile(r"^(?:.*\.)?layers\.\d+(?=\.|$)")


def group_of_tensor(name: str) -> str:
    """The decoder layer that a tensor belongs to ("model.layers.3"), else its module ("model.norm")."""
    return group_of_module(name.rpartition(".")[0])


def group_of_module(name: str) -> str:
    match = DECODER_LAYER.match(name)
    return match[0] if match else name
