"""Options of earlier versions, and what to say instead."""

from __future__ import annotations

from collections.abc import Sequence

REMEDIES = {
    "rollout.request_timeout_seconds": "a request has no time limit of its own any more: set rollout.stall_seconds, "
    "the time without any token on a server that has work, or leave it out",
}


def renamed_faults(words: Sequence[str]) -> list[str]:
    """A sentence for each word of a command line that is such an option, also within a pipeline's stage."""
    faults = []
    for word in words:
        option = word.partition("=")[0].removeprefix("--").replace("-", "_")
        faults += [
            f"{word.partition('=')[0]}: {remedy}"
            for field, remedy in REMEDIES.items()
            if word.startswith("--") and (option == field or option.endswith(f".{field}"))
        ]
    return faults
