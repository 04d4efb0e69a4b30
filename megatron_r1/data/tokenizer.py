"""Text to token ids and back, from a Hugging Face folder and nothing else.

`tokenizer.json` is the only source of the text rules. The class that `tokenizer_config.json` names is ignored
on purpose: under transformers 5 LlamaTokenizerFast, which DeepSeek's folders name, rebuilds the rules of
Llama's tokenizer and silently drops spaces and Chinese. No remote code is ever run and no hub is asked. Left
out: sentencepiece-only folders and training a tokenizer from a corpus.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import Message

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Single tokens of the character tokenizer; the structure that the format reward demands."""


Thinking = Literal["on", "off", "template"]
"""Whether the chat template is asked for a thought, for none, or left to its default."""

THINKING_OPTIONS: Mapping[Thinking, Mapping[str, bool]] = {
    "on": {"thinking": True, "enable_thinking": True},
    "off": {"thinking": False, "enable_thinking": False},
    "template": {},
}
"""DeepSeek's and Qwen's names for it; templates that know neither do not notice."""

PROBE = "megatron-r1-probe"
"""An answer that stands in the chat template's output exactly once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A loaded tokenizer. `inner` is transformers' object; the rest is what the training loop asks for.

    `eos_ids` are all ids that end a completion (the tokenizer's own, generation_config.json's, and the one with which
    the chat template ends an answer, which in ChatML's base models is neither of them), `eos_id` the first of them;
    `bos_id` is set only when the folder asks for it to be put in front of a text.
    """

    inner: Any
    folder: Path
    eos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None
    vocab_size: int
    """Ids run from 0 to vocab_size - 1; the model's embedding may have more rows."""
    thinking: Thinking = "on"
    """What the chat template is told about thoughts."""
    rows: int | None = None
    """Rows of the embedding of the model in the folder (config.json's vocab_size); None: there is no model."""

    def encode(self, text: str, *, start: bool = False) -> np.ndarray:
        """Token ids i32[T] of `text`. `start` puts the start-of-text token in front where the folder wants
        one. DataError for a token that the model's embedding has no row for."""
        ids = self.inner.encode(text, add_special_tokens=False)
        if start and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if ids:
            self.check_row(max(ids))
        return np.asarray(ids, dtype=np.int32)

    @property
    def every_token_has_a_row(self) -> bool:
        return self.rows is None or self.vocab_size <= self.rows

    def check_row(self, token: int) -> None:
        """DataError if the model's embedding has no row for `token`."""
        if self.rows is not None and token >= self.rows:
            raise DataError(
                f"{self.folder}: the tokenizer writes token {token}, {self.inner.convert_ids_to_tokens(token)!r}, but "
                f"the model's embedding has {self.rows} rows (config.json, vocab_size); use the tokenizer that came "
                "with the model, or enlarge the model with transformers' resize_token_embeddings"
            )

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of a completion: end and padding tokens at its end are dropped, every other token is kept.

        Special tokens in the middle stay visible so that the format reward sees them.
        """
        ids = [int(token) for token in token_ids]
        while ids and (ids[-1] in self.eos_ids or ids[-1] == self.pad_id):
            ids.pop()
        return self.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The model's own chat template, ending where the assistant's turn begins. ConfigError if it has
        none."""
        if not self.inner.chat_template:
            raise ConfigError(
                f"data.template: 'chat' needs a chat template and {self.folder} has none; "
                "expected tokenizer_config.json 'chat_template' or chat_template.jinja; "
                "use template 'r1_zero' or 'plain', or an instruction-tuned model's folder"
            )
        return self.render(messages, add_generation_prompt=True)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """What the chat template makes of these turns; the folder must have one."""
        turns = [dict(message) for message in messages]
        return self.inner.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **THINKING_OPTIONS[self.thinking]
        )


def load_tokenizer(folder: Path | str, *, thinking: Thinking = "on") -> Tokenizer:
    """Load `folder`'s tokenizer.json. Raises ConfigError (missing folder or file) or DataError (unreadable one, or one
    whose end-of-sequence token the model in the folder does not have)."""
    from transformers import PreTrainedTokenizerFast  # half a second; only runs that tokenize pay for it

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        found = "no such folder" if not folder.is_dir() else "the folder has no tokenizer.json"
        raise ConfigError(
            f"model.path: {folder} ({found}); expected a Hugging Face folder with tokenizer.json; "
            "export one with transformers: AutoTokenizer.from_pretrained(source).save_pretrained(folder)"
        )
    settings = _read_json(folder / "tokenizer_config.json")
    try:
        inner = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{folder / 'tokenizer.json'}: cannot be read as a tokenizer: {error}") from error
    eos_ids = _end_ids(inner.eos_token_id, _read_json(folder / "generation_config.json").get("eos_token_id"))
    if not eos_ids:
        raise ConfigError(
            f"model.path: {folder} names no end-of-sequence token; expected 'eos_token' in "
            "tokenizer_config.json; add it: without one a completion could never end"
        )
    wants_start = bool(settings.get("add_bos_token", False)) and inner.bos_token_id is not None
    turn_end = turn_end_id(inner) if inner.chat_template else None
    rows = _read_json(folder / "config.json").get("vocab_size")
    pad_id = inner.pad_token_id
    if pad_id is None or (isinstance(rows, int) and pad_id >= rows):  # a padding token is often added, without a row
        pad_id = eos_ids[0]
    tokenizer = Tokenizer(
        inner=inner,
        thinking=thinking,
        folder=folder,
        eos_id=eos_ids[0],
        eos_ids=eos_ids if turn_end is None else tuple(dict.fromkeys((*eos_ids, turn_end))),
        pad_id=pad_id,
        bos_id=inner.bos_token_id if wants_start else None,
        vocab_size=len(inner),
        rows=rows if isinstance(rows, int) else None,
    )
    tokenizer.check_row(tokenizer.eos_id)
    return tokenizer


def character_tokenizer(folder: Path | str, *, phrases: Sequence[str] = ()) -> Tokenizer:
    """Write the embedded default's tokenizer into `folder` and load it.

    One token per printable ASCII character and newline, one per tag of the answer's structure, one for each of
    `phrases`, and <pad>, <eos>, <unk>. The tags are ordinary tokens, not special ones, so engines that hide special
    tokens still show them.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Rules
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    names = ("<pad>", "<eos>", "<unk>", *TAGS, *characters)
    rules = Rules(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    rules.decoder = decoders.Fuse()
    rules.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<eos>", "<unk>")])
    rules.add_tokens([AddedToken(text, normalized=False, special=False) for text in (*TAGS, *phrases)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=rules,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def turn_end_id(inner: Any) -> int | None:
    """The first special token that the chat template writes after an answer; None if it writes none."""
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": PROBE}]
    try:
        _, found, tail = inner.apply_chat_template(turns, tokenize=False).rpartition(PROBE)
    except TemplateError:  # no conversation can be written with it: who tries is told by render_chat
        return None
    special = {number for number, token in inner.added_tokens_decoder.items() if token.special}
    after = inner.encode(tail, add_special_tokens=False) if found else []
    return next((token for token in after if token in special), None)


def _end_ids(own: int | None, generation: int | Sequence[int] | None) -> tuple[int, ...]:
    listed = [] if generation is None else [generation] if isinstance(generation, int) else list(generation)
    ids = ([] if own is None else [own]) + listed
    return tuple(dict.fromkeys(int(token) for token in ids))


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
