"""Tokenise files of conversations once, into a folder that later runs and other ranks open.

The folder's name is a hash of what its content depends on (the files' bytes, the tokenizer, the template, the longest
example), so that a change of any makes another folder. It is written beside and renamed when it is whole; whoever comes
second waits and takes it. Left out: more than one process (tokenising 800k long answers takes hours; it is done once).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import blake3
import numpy as np

from megatron_r1.data.answers import AnswerEncoder
from megatron_r1.data.conversations import Conversation, read_conversations
from megatron_r1.data.examples import COUNTS, INDEX, TOKENS, FileCounts, open_cache, to_stored
from megatron_r1.data.problems import normalised_text
from megatron_r1.data.tokenizer import PROBE
from megatron_r1.errors import DataError
from megatron_r1.types import Problem

FORMAT = 2
"""Of the folder; raised when what is written for the same input changes."""

PROGRESS_LINES = 500
BLOCK_BYTES = 1 << 22


def build_cache(
    files: Sequence[Path],
    *,
    encoder: AnswerEncoder,
    max_tokens: int,
    cache_dir: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The folder with the files' examples, for `examples.open_cache`; made if it is not there. Call it on one rank.

    `on_progress` gets (lines read, lines of all files) now and then while it is made. DataError for a malformed line,
    and for a file of which no example is left.
    """
    key, num_lines = _fingerprint(files, encoder, max_tokens)
    folder, partial = cache_dir / key, cache_dir / f"{key}.partial"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cache_dir / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(folder):
                for remains in (partial, folder):
                    shutil.rmtree(remains, ignore_errors=True)
                partial.mkdir()
                try:
                    tell = (lambda lines: on_progress(lines, num_lines)) if on_progress else None
                    _write(partial, files, encoder, max_tokens, tell)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written: {error.strerror}; free space or choose another folder"
        ) from error
    return folder


def _fingerprint(files: Sequence[Path], encoder: AnswerEncoder, max_tokens: int) -> tuple[str, int]:
    """A hash of all that the folder's content depends on, and the number of lines of all files."""
    tokenizer = encoder.tokenizer
    question = {"role": "user", "content": PROBE}
    ids, _ = encoder.encode((question, {"role": "assistant", "content": PROBE}), where="fingerprint")
    chat = (str(tokenizer.inner.chat_template), tokenizer.thinking, encoder.thought_form)
    rules = (FORMAT, max_tokens, encoder.template, ids.tolist(), chat)
    digest = blake3.blake3(repr(rules).encode())
    digest.update((tokenizer.folder / "tokenizer.json").read_bytes())
    num_lines = 0
    for path in files:
        content = blake3.blake3()
        try:
            with open(path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    content.update(block)
                    num_lines += block.count(b"\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check the data's files") from error
        digest.update(content.digest())
    return digest.hexdigest()[:32], num_lines


def _is_whole(folder: Path) -> bool:
    try:
        open_cache(folder)
    except DataError:
        return False
    return True


def _write(
    folder: Path,
    files: Sequence[Path],
    encoder: AnswerEncoder,
    max_tokens: int,
    tell: Callable[[int], None] | None,
) -> None:
    lengths: list[int] = []
    questions: list[int] = []
    counts: list[FileCounts] = []
    lines = 0
    with open(folder / TOKENS, "wb") as tokens:
        for path in files:
            kept, too_long, control, untrained = len(lengths), 0, 0, 0
            not_read: Counter[str] = Counter()
            for conversation in read_conversations(path):
                lines += 1
                if tell is not None and lines % PROGRESS_LINES == 0:
                    tell(lines)
                not_read.update(conversation.not_read)
                if encoder.has_control_text(conversation.messages):
                    control += 1
                    continue
                ids, mask = encoder.encode(conversation.messages, where=conversation.where)
                if len(ids) > max_tokens:
                    too_long += 1
                    continue
                tokens.write(to_stored(ids, mask).tobytes())
                lengths.append(len(ids))
                untrained += _num_answers(conversation) - np.count_nonzero(np.diff(mask, prepend=False) & mask)
                questions.append(_question_hash(conversation))
            counts.append(
                FileCounts(
                    kept=len(lengths) - kept, too_long=too_long, control_text=control,
                    not_read=dict(not_read), untrained=int(untrained),
                )
            )  # fmt: skip
            if not counts[-1].kept:
                raise DataError(
                    f"{path}: no example is left: {too_long} are longer than max_tokens {max_tokens}, {control} have "
                    "the text of a special token in a turn; raise max_tokens or clean the file"
                )
        _flush(tokens)
    with open(folder / INDEX, "wb") as index:
        np.savez(
            index,
            starts=np.cumsum([0, *lengths], dtype=np.int64),
            files=np.repeat(np.arange(len(files), dtype=np.int32), [count.kept for count in counts]),
            questions=np.array(questions, dtype=np.uint64),
        )
        _flush(index)
    with open(folder / COUNTS, "wb") as out:
        out.write(json.dumps([asdict(count) for count in counts]).encode())
        _flush(out)


def _num_answers(conversation: Conversation) -> int:
    return sum(message["role"] == "assistant" for message in conversation.messages)


def _question_hash(conversation: Conversation) -> int:
    turns = Problem(id=conversation.where, domain="", messages=conversation.messages[:-1])
    return int.from_bytes(hashlib.blake2b(normalised_text(turns).encode(), digest_size=8).digest(), "little")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
