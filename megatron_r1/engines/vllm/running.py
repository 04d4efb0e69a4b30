"""A vLLM server that somebody else runs, as a source of completions. Nothing of it is started, stopped or changed here.

Prompts go as token ids and completions come back as token ids (vLLM's /v1/completions with return_token_ids), so they
are the same as from servers of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.config.schema import RunningServerConfig
from megatron_r1.engines.base import Decode, Progress, RequestError, check_room
from megatron_r1.engines.vllm.client import EngineClient
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.types import Completion

CHECK_SECONDS = 30.0


class CompletionsClient(EngineClient):
    """EngineClient over /v1/completions. Errors are EngineClient's."""

    def __init__(self, server: RunningServerConfig, config: RolloutConfig) -> None:
        token = server.token_file.read_text(encoding="utf-8").strip() if server.token_file else ""
        super().__init__(server.url.rstrip("/").removesuffix("/v1"), token=token, config=config, model=server.model)

    def weight_version(self) -> int:
        """0: whoever runs the server knows."""
        return 0

    def models(self) -> list[str]:
        """The names under which the server knows its models. ConfigError if it does not answer as vLLM does."""
        try:
            return [str(model["id"]) for model in self.request("GET", "/v1/models", timeout=CHECK_SECONDS)["data"]]
        except (EngineError, RequestError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"server.url: {self.base_url} does not answer as a vLLM server does ({error}); start it, and see "
                "server.token_file"
            ) from error

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        num_completions: int,
        sampling: SamplingConfig,
        seed: int | None = None,
        decode: Decode | None = None,
    ) -> tuple[Completion, ...]:
        """As EngineClient.generate, but without logprobs: they are zeros."""
        room = check_room(prompt_ids, self.config.max_model_len)
        body = {
            "model": self.model,
            "prompt": [int(token) for token in prompt_ids],
            "n": num_completions,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": min(sampling.max_new_tokens, room),
            "stop_token_ids": list(sampling.stop_token_ids),
            "return_token_ids": True,
            **({} if seed is None else {"seed": seed}),
        }
        choices = self.work("/v1/completions", body)["choices"]
        if len(choices) != num_completions or any(not isinstance(c.get("token_ids"), list) for c in choices):
            raise EngineError(
                f"{self.base_url}: asked for {num_completions} completions with their token ids, got "
                f"{len(choices)}, or without: the server must be vLLM 0.10 or newer"
            )
        return tuple(_completion(choice, decode) for choice in sorted(choices, key=lambda choice: choice["index"]))


def _completion(choice: dict, decode: Decode | None) -> Completion:
    token_ids = np.asarray(choice["token_ids"], dtype=np.int32)
    return Completion(
        token_ids=token_ids,
        logprobs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason=str(choice["finish_reason"]),
        weight_version=0,
        text=decode(choice["token_ids"]) if decode is not None else str(choice["text"]),
    )


class RunningServer:
    """An engine (engines.base.Engine) whose process is somebody else's: it is never started or stopped, and its failure
    is final."""

    index, name = 0, "vllm-0"
    starts = 1

    def __init__(self, server: RunningServerConfig, rollout: RolloutConfig) -> None:
        """ConfigError if the server does not answer, has not the model, or does not count tokens."""
        self.config = dataclasses.replace(rollout, num_engines=1)
        self.client = CompletionsClient(server, rollout)
        names = self.client.models()
        if server.model not in names:
            raise ConfigError(f"server.model is {server.model!r}; {server.url} has {', '.join(names) or 'none'}")
        if self.client.count_tokens(CHECK_SECONDS) is None:
            raise ConfigError(
                f"server.url: {self.where}/metrics has no counters of tokens, by which a stuck server is told "
                "from a slow one; start it without --disable-log-stats"
            )

    @property
    def where(self) -> str:
        """Its address; its log is not ours."""
        return self.client.base_url

    def start(self) -> None:
        """Nothing: it runs."""

    def wait_ready(self, progress: Progress | None = None) -> float:
        """It was ready when this was made."""
        del progress
        return 0.0

    def alive(self) -> bool:
        return self.client.healthy()

    def restart(self, progress: Progress | None = None) -> None:
        del progress
        raise EngineError(f"{self.where} failed; it is not ours to start again")

    def forgive(self) -> None:
        """Nothing: no failure is counted."""

    def stop(self) -> None:
        """Nothing: it goes on running."""
