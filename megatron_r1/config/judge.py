"""How another model is asked for its judgement (rewards/judge.py), as data, with its rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_r1.bounds import Count, Natural, NonNegative, Positive, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """A server that speaks OpenAI's chat API, such as `vllm serve`."""

    url: str
    """Up to and with the version: http://host:8000/v1."""
    model: str
    """The name under which the server knows the judge."""
    token_file: Path | None = None
    """File that holds the server's bearer token."""
    domains: tuple[str, ...] = ()
    """Problems of these domains may be judged; empty: of all. Only answers that no rule recognised are."""
    timeout_seconds: Positive = 300.0
    """One request's; past it the request is sent again, `retries` times."""
    retries: Natural = 2
    """Further attempts after a time-out, a failure of the server or an answer without a verdict."""
    concurrency: Count = 32
    """Requests that are under way at once."""
    max_new_tokens: Count = 4096
    """Longest answer of the judge, in tokens."""
    temperature: NonNegative = 0.6
    """Above 0, so that a second attempt or judgement can differ from the first; the seeds are fixed."""
    max_failed: Share = 0.1
    """Largest share of judgements that may come to nothing; more stops the stage."""


def judge_faults(judge: JudgeConfig) -> list[str]:
    """Faults of `judge` besides its bounds, as sentences."""
    faults = []
    if not judge.url.startswith(("http://", "https://")) or judge.url.endswith("/chat/completions"):
        faults.append(f"judge.url is {judge.url!r}; it is the API's root, such as http://host:8000/v1")
    elif "@" in judge.url:
        faults.append("judge.url holds a password, which would be written to the run's files: use judge.token_file")
    if not judge.model:
        faults.append("judge.model is empty; it is the name under which the server knows the judge (GET /v1/models)")
    if judge.token_file is not None and not judge.token_file.is_file():
        faults.append(f"judge.token_file: {judge.token_file} does not exist; it holds the server's bearer token")
    return faults
