"""Other conversations beside the kept samples, in the configured proportion (paper: 600k reasoning, 200k other).

No conversation is repeated: where there are too few, all are taken and the report says so. Files are streamed twice,
once to check and count and once to copy, so their size does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.data.conversations import read_conversations
from megatron_r1.data.decontaminate import EvaluationIndex, overlap_of
from megatron_r1.stages.rejection.config import MixSource


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherData:
    """A source whose every line was read: `usable` are the numbers (from 0) of those that overlap no evaluation
    problem."""

    source: MixSource
    usable: tuple[int, ...]
    num_contaminated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What of a source goes into the output: `wanted` by its weight, the line numbers `taken`."""

    data: OtherData
    wanted: int
    taken: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "file": str(self.data.source.file),
            "weight": self.data.source.weight,
            "wanted": self.wanted,
            "written": len(self.taken),
            "available": len(self.data.usable),
            "contaminated": self.data.num_contaminated,
        }


def check_source(source: MixSource, index: EvaluationIndex) -> OtherData:
    """Read the whole file. DataError names file, line and reason."""
    clean = [overlap_of(conversation.messages, index) is None for conversation in read_conversations(source.file)]
    usable = tuple(number for number, ok in enumerate(clean) if ok)
    return OtherData(source=source, usable=usable, num_contaminated=len(clean) - len(usable))


def mix(num_kept: int, others: Sequence[OtherData], *, weight: float, seed: int) -> list[Share]:
    """A seeded draw, without repeats, of round(num_kept * source weight / weight) lines of each source, or of all it
    has."""
    shares = []
    for number, data in enumerate(others):
        wanted = round(num_kept * data.source.weight / weight)
        rng = np.random.default_rng([seed, number])
        taken = rng.choice(np.array(data.usable, dtype=np.int64), min(wanted, len(data.usable)), replace=False)
        shares.append(Share(data=data, wanted=wanted, taken=tuple(sorted(int(line) for line in taken))))
    return shares


def records(share: Share) -> Iterator[dict[str, Any]]:
    """The taken conversations as lines of the output."""
    file, taken = share.data.source.file, frozenset(share.taken)
    for number, conversation in enumerate(read_conversations(file)):
        if number in taken:
            yield {
                "id": f"{file.stem}:{number + 1}",
                "messages": conversation.messages,
                "domain": file.stem,
                "source": file.name,
                "provenance": {"file": str(file), "line": number + 1},
            }
