"""From a published FP8 folder (DeepSeek-V3-Base) to what a recipe needs: a bf16 folder beside it.

    python tools/prepare_checkpoint.py PUBLISHED TARGET [--recipe grpo_671b] [--workers N]

Checks that PUBLISHED is whole (config, tokenizer, every file that its index names, no file cut short) and FP8, writes
TARGET in bf16 for model.path, and says what the recipe still lacks. PUBLISHED itself is the recipe's FP8 folder
(rollout.fp8_folder). Repeat the command after an interruption: it goes on, and a finished TARGET is only compared.

Exit status: 0 done, 2 a fault, which is named with its remedy, or stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1.stages.grpo.config import GRPOConfig


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, metavar="PUBLISHED")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--recipe", default="grpo_671b", help="of an RL stage; it is checked at the end")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    convert = _converter()
    from megatron_r1.errors import ConfigError, UserError

    try:
        recipe = _recipe(options.recipe)
        _check_source(options.published)
        if (options.target / "config.json").exists():
            status = convert.main(["verify", str(options.published), str(options.target), "--names-only"])
        else:
            words = ["hf-to-hf", str(options.published), str(options.target), "--precision", "bf16"]
            words += ["--workers", str(options.workers)]
            begun = options.target.with_name(options.target.name + ".partial").exists()
            status = convert.main([*words, "--resume"] if begun else words)
        if status == 1:
            raise ConfigError(
                f"{options.target}: is not the model of {options.published}; give another TARGET, or move it away"
            )
        if status:
            return status
        _say_what_is_next(recipe, options.published, options.target)
    except ConfigError as error:
        print("\n".join(error.faults), file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _check_source(folder: Path) -> None:
    """Raises ConfigError or CheckpointError where the folder is not a whole FP8 model with a tokenizer."""
    from megatron_r1.config.shape import load_shape
    from megatron_r1.errors import ConfigError
    from megatron_r1.weights.folders import check_kind
    from megatron_r1.weights.hf_folder import read_locations

    if not folder.is_dir():
        raise ConfigError(f"{folder}: does not exist; fetch the published model there first, every file of it")
    shape = load_shape(folder)
    if shape.fp8_block is None:
        raise ConfigError(f"{folder}: is not FP8; nothing is to be prepared: give it as model.path")
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder}: holds no tokenizer.json; fetch it from where the weights came from")
    check_kind(folder, "hf")
    read_locations(folder)


def _recipe(name: str) -> GRPOConfig:
    from megatron_r1.errors import ConfigError
    from megatron_r1.recipes import RECIPES
    from megatron_r1.stages.grpo.config import GRPOConfig

    recipe = RECIPES[name]() if name in RECIPES else None
    if not isinstance(recipe, GRPOConfig):
        raise ConfigError(f"--recipe is {name}; it must be an RL recipe, such as grpo_671b")
    return recipe


def _say_what_is_next(recipe: GRPOConfig, published: Path, target: Path) -> None:
    from megatron_r1.errors import ConfigError
    from megatron_r1.pipeline.kinds import check

    print(f"model.path: {target} (bf16)   rollout.fp8_folder: {published} (FP8, only if rollouts should be)")
    try:
        check(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path=target)), folder=False)
    except ConfigError as error:
        print(f"{recipe.name} still lacks:\n  " + "\n  ".join(error.faults))
    else:
        print(f"{recipe.name} has all that it needs: --model.path {target}")


def _converter() -> ModuleType:
    """tools/convert_checkpoint.py, whose bar, signals and messages are wanted too."""
    path = Path(__file__).with_name("convert_checkpoint.py")
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
