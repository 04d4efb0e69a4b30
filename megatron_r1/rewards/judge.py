"""Judgements by another model, from any server that speaks OpenAI's chat API (`vllm serve` does).

The question is whether an answer means the same as the reference. What comes back is a verdict or the reason why there
is none, never a guess. Left out: what is shown (judge_text.py) and how the judge's answer is read (verdicts.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import urllib3

from megatron_r1.config.judge import JudgeConfig
from megatron_r1.errors import JudgeError
from megatron_r1.rewards.judge_text import reference_prompt
from megatron_r1.rewards.verdicts import parse_verdict

T = TypeVar("T")

CHECK_SECONDS = 30.0
FAILURES = ("timeout", "nonsense", "server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """`value`: what the judge decided; None: nothing, for the reason `failure` ("timeout", "nonsense" or "server")."""

    value: Any
    failure: str | None = None


class Judge:
    """Asks one server, from `concurrency` threads. `counts` of judgements asked and of each failure grow over its life.

    JudgeError when the server refuses (wrong token, unknown model), or when more than `max_failed` of all judgements
    come to nothing.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._sample = ""
        """An answer that made no sense, or the last error, for the message."""
        self._given_up = False
        self._headers = {"Content-Type": "application/json"}
        if config.token_file is not None:
            self._headers["Authorization"] = f"Bearer {config.token_file.read_text(encoding='utf-8').strip()}"
        self._pool = urllib3.PoolManager(maxsize=config.concurrency, retries=False)

    def check(self) -> None:
        """Ask the server which models it has. JudgeError if it does not answer, or has not this one: before hours of
        sampling."""
        url = f"{self.config.url.rstrip('/')}/models"
        try:
            answer = self._pool.request("GET", url, headers=self._headers, timeout=CHECK_SECONDS)
            names = [str(model["id"]) for model in json.loads(answer.data)["data"]] if answer.status == 200 else None
        except (urllib3.exceptions.HTTPError, ValueError, TypeError, KeyError) as error:
            raise JudgeError(
                f"judge.url: {url} does not answer as OpenAI's API does ({error}); start it first"
            ) from error
        if names is None:
            raise JudgeError(f"judge.url: {url} answered {answer.status}: {answer.data[:500]!r}; see judge.token_file")
        if self.config.model not in names:
            raise JudgeError(f"judge.model is {self.config.model!r}; {url} has {', '.join(names) or 'none'}")

    def match_reference(self, questions: Sequence[tuple[str, str, str]]) -> list[Judgement]:
        """Of each (question, reference, response): does the response's answer mean the same as the reference? Values
        are True or False; order kept."""
        return self._ask([(reference_prompt(*texts), 0) for texts in questions], parse_verdict)

    def _ask(self, asked: Sequence[tuple[str, int]], parse: Callable[[str], T | None]) -> list[Judgement]:
        due = self.counts["asked"] + len(asked)
        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="judge") as threads:
            futures = [threads.submit(self._judgement, prompt, seed, parse) for prompt, seed in asked]
            try:
                found = []
                for future in futures:
                    found.append(judgement := future.result())
                    self.counts["asked"] += 1
                    self.counts[judgement.failure or "judged"] += 1
                    self._check_failures(due)
            except BaseException:
                self._given_up = True
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _judgement(self, prompt: str, seed: int, parse: Callable[[str], T | None]) -> Judgement:
        """One judgement, after at most 1 + retries requests; the last attempt's failure stands."""
        failure = ""
        for attempt in range(1 + self.config.retries):
            body = {
                "model": self.config.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": self.config.temperature,
                "max_tokens": self.config.max_new_tokens,
                "seed": seed * (1 + self.config.retries) + attempt,
            }
            if self._given_up:
                break
            failure, text = self._request(body)
            if text is not None:
                value = parse(text)
                if value is not None:
                    return Judgement(value=value)
                failure, self._sample = "nonsense", text
        return Judgement(value=None, failure=failure)

    def _request(self, body: Mapping[str, Any]) -> tuple[str, str | None]:
        """("", the judge's text), or (failure, None)."""
        url = f"{self.config.url.rstrip('/')}/chat/completions"
        try:
            answer = self._pool.request(
                "POST", url, body=json.dumps(body), headers=self._headers, timeout=self.config.timeout_seconds
            )
        except urllib3.exceptions.TimeoutError:
            return "timeout", None
        except urllib3.exceptions.HTTPError as error:
            self._sample = str(error)
            return "server", None
        if answer.status in (401, 403, 404):
            raise JudgeError(f"judge.url: {url} refused with {answer.status}: {answer.data[:500]!r}")
        try:
            content = json.loads(answer.data)["choices"][0]["message"]["content"]
        except (ValueError, TypeError, LookupError):
            self._sample = f"{answer.status}: {answer.data[:500]!r}"
            return "server", None
        return "", content or ""

    def _check_failures(self, due: int) -> None:
        """JudgeError as soon as too large a share of the `due` judgements has failed, whatever the rest says."""
        counts, config = self.counts, self.config
        failed = {name: counts[name] for name in FAILURES if counts[name]}
        if sum(failed.values()) > config.max_failed * due:
            said = ", ".join(f"{number} {name}" for name, number in failed.items())
            shown = f"; for example it answered: {self._sample[-500:]!r}" if self._sample else ""
            raise JudgeError(
                f"judge.url: {config.url} came to no verdict in {sum(failed.values())} of {due} cases ({said}), more "
                f"than judge.max_failed = {config.max_failed}{shown}; use a stronger judge.model, or raise "
                "judge.timeout_seconds, judge.max_new_tokens or judge.max_failed"
            )
