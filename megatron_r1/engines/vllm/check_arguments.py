"""Whether vLLM's own parser takes rollout.vllm_args: python -m megatron_r1.engines.vllm.check_arguments --NAME=VALUE...

A process of its own, because it imports vLLM. Ends with 0, or with 2 and the parser's complaint as the last line of
stderr. Nothing is started.
"""

from __future__ import annotations

import subprocess
import sys

from megatron_r1.config.schema import RolloutConfig
from megatron_r1.config.vllm_args import command_words

PARSE_SECONDS = 300.0


def parser_faults(rollout: RolloutConfig) -> list[str]:
    """What vLLM's parser says against rollout.vllm_args; nothing if vLLM is not installed here."""
    arguments = command_words(rollout)
    if not arguments:
        return []
    command = [sys.executable, "-m", __name__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PARSE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [
            f"rollout.vllm_args: vLLM's parser did not answer within {PARSE_SECONDS:.0f} s; look at its installation"
        ]
    if done.returncode == 0:
        return []
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return [f"rollout.vllm_args is {' '.join(rollout.vllm_args)}; vLLM does not take it: {lines[-1].strip()}"]


def main() -> None:
    try:
        from vllm.entrypoints.cli import serve
    except ModuleNotFoundError:
        return
    serve.make_arg_parser(serve.FlexibleArgumentParser(prog="vllm")).parse_args(["--model", "m", *sys.argv[1:]])


if __name__ == "__main__":
    main()
