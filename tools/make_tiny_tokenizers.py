"""Write the tokenizers of the embedded default's models into megatron_r1/recipes/.

    tools/make_tiny_tokenizers.py

The teacher and the student have the same phrases in another order, so that no token id means the same to both.
"""

from __future__ import annotations

from pathlib import Path

import megatron_r1.recipes
from megatron_r1.data.tokenizer import character_tokenizer
from megatron_r1.toy.world import PHRASES

RECIPES = Path(megatron_r1.recipes.__file__).parent

for name, phrases in (("tiny_v3", ()), ("tiny_r1", PHRASES), ("tiny_qwen2", PHRASES[::-1])):
    tokenizer = character_tokenizer(RECIPES / name, phrases=phrases)
    print(f"{name}: {tokenizer.vocab_size} tokens")
