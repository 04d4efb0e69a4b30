"""The command line: megatron-r1 run RECIPE | doctor | recipes.

`run` checks the configuration without torch, then starts one process a rank (this same command, seen from the inside by
the rank that torchrun gave it). Under an outer torchrun, as on a cluster, it is the rank itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from megatron_r1.config import RunConfig, validate
from megatron_r1.errors import CheckpointError, ConfigError, DataError, EngineError, MismatchError
from megatron_r1.recipes import RECIPES

USAGE = """usage: megatron-r1 run RECIPE [--dry-run] [--FIELD VALUE ...]
       megatron-r1 doctor [RECIPE]
       megatron-r1 recipes

Every field of a recipe can be set, e.g. megatron-r1 run quickstart --grpo.kl-coef 0.001;
megatron-r1 run RECIPE --help lists them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 the command or configuration is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (words[0], words[1:]) if words else ("help", [])
    try:
        if command == "run":
            return _run(rest)
        if command == "doctor":
            from megatron_r1.doctor import doctor

            return doctor(rest)
        if command == "recipes":
            for name, recipe in RECIPES.items():
                print(f"{name:14s} {(recipe.__doc__ or '').strip().splitlines()[0]}")
            return 0
    except ConfigError as error:
        print(f"megatron-r1: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, DataError, EngineError, MismatchError, FileExistsError, OSError) as error:
        print(f"megatron-r1: {error}", file=sys.stderr)
        return 1
    print(USAGE, file=sys.stdout if command in ("help", "-h", "--help") else sys.stderr)
    return 0 if command in ("help", "-h", "--help") else 2


def parse(words: Sequence[str]) -> RunConfig:
    """RECIPE and its overrides as a RunConfig. Raises ConfigError for an unknown recipe; tyro exits on an unknown
    field."""
    if not words or words[0].startswith("-"):
        raise ConfigError(f"name a recipe first: {', '.join(RECIPES)}")
    if words[0] not in RECIPES:
        raise ConfigError(f"no recipe is called {words[0]!r}; there are {', '.join(RECIPES)}")
    return tyro.cli(RunConfig, default=RECIPES[words[0]](), args=list(words[1:]), prog=f"megatron-r1 run {words[0]}")


def _run(words: list[str]) -> int:
    dry_run = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    config = parse(words)
    is_rank = "RANK" in os.environ
    if not is_rank or dry_run:
        from megatron_r1.planning.summary import describe, describe_fields

        # A rank's folder has just been made by its parent; only the outside looks whether it may be.
        shape = validate(config)
        print(describe(config, shape))
        if dry_run:
            print(describe_fields(config))
            return 0
        from megatron_r1.pipeline.folder import prepare_folder
        from megatron_r1.pipeline.launch import launch_local

        moved = prepare_folder(config)
        if moved is not None:
            print(f"the earlier run was moved to {moved}")
        return launch_local(config, words)
    from megatron_r1.pipeline.worker import run_rank

    return run_rank(config)


if __name__ == "__main__":
    raise SystemExit(main())
