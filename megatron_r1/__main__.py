"""The command line: megatron-r1 run RECIPE | plan RECIPE | evaluate | diagnose | check-data | report | doctor | ...

`run` checks the configuration without torch, then starts one process a rank: this same command, told its rank by RANK.
Under an outer launcher that sets RANK (torchrun, or srun by slurm/launch.sh) it is the rank itself, and checks for
itself.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from megatron_r1.bounds import number_faults
from megatron_r1.cluster.task import become_rank
from megatron_r1.config.chosen import with_choices
from megatron_r1.config.describe import meaning_of
from megatron_r1.config.packages import bytecode_remedy, describe_versions, lacks_bytecode
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.renamed import renamed_faults
from megatron_r1.config.schema import StageConfig
from megatron_r1.config_file import read_config_file, recipe_word
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.pipeline.chain import run_pipeline
from megatron_r1.pipeline.help import answer_help
from megatron_r1.pipeline.kinds import check, needs_of, summary_of
from megatron_r1.pipeline.launch import PARENT_VARIABLE
from megatron_r1.pipeline.options import moving_faults, split_config, split_options
from megatron_r1.pipeline.run import run_here, run_stage
from megatron_r1.planning.summary import describe_fields
from megatron_r1.plugins import told
from megatron_r1.recipes import RECIPES
from megatron_r1.recipes.named import about_recipe, recipe_named
from megatron_r1.stages.evaluate.config import EvaluateConfig

USAGE = """usage: megatron-r1 run RECIPE [--dry-run] [--FIELD VALUE ...]
       megatron-r1 run PIPELINE [--from STAGE] [--until STAGE] [--only STAGE] [--dry-run] [--STAGE.FIELD VALUE ...]
       megatron-r1 run [RECIPE] --config FILE [--FIELD VALUE ...]     FILE: a run's run.json, or TOML
       megatron-r1 plan RECIPE|FOLDER [--gpus N] [--gpu h100|h200|b200|...] [--json] [--FIELD VALUE ...]
       megatron-r1 evaluate --model FOLDER --run-dir FOLDER --data.files FILE ... [--FIELD VALUE ...]
       megatron-r1 diagnose FOLDER [--FIELD VALUE ...]      which module of vLLM's model and the trainer's departs
       megatron-r1 check-data --data.files FILE ... [--FIELD VALUE ...]      faults of problems, before a run
       megatron-r1 report [FOLDER]       the page of a run, or an index over all runs below FOLDER (runs)
       megatron-r1 doctor [RECIPE]
       megatron-r1 recipes
       megatron-r1 --version             of this program and of the libraries under it
       megatron-r1 nodes RECIPE --slots-per-node N       how many cluster nodes each stage needs
       megatron-r1 preflight | serve RECIPE ...          what slurm/launch.sh calls on a job's nodes

Every field of a recipe can be set, those of a pipeline's stage with its name before them:
megatron-r1 run quickstart --grpo.algorithm.kl.coef 0.01. megatron-r1 run RECIPE --help lists the common ones,
--help-all every one; so does docs/configuration.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 the command or configuration is wrong, 75 start it again."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (words[0], words[1:]) if words else ("help", [])
    try:
        if command == "run" and rest[:1] not in (["-h"], ["--help"]):
            return _run(rest)
        if command == "plan":
            return _plan(rest)
        if command == "evaluate":
            return _evaluate(rest)
        if command == "diagnose":
            from megatron_r1.diagnose.command import diagnose

            return diagnose(rest)
        if command == "check-data":
            return _check_data(rest)
        if command == "report":
            return _report(rest)
        if command in ("nodes", "preflight", "serve"):
            from megatron_r1.pipeline.cluster_commands import cluster_command

            return cluster_command(command, rest, parse)
        if command in ("version", "--version"):
            print(describe_versions())
            return 0
        if command == "doctor":
            from megatron_r1.doctor.command import doctor

            return doctor(rest)
        if command == "recipes":
            for name, recipe in RECIPES.items():
                print(f"{name:14s} {(recipe.__doc__ or '').strip().splitlines()[0]}")
            return 0
    except ConfigError as error:
        if os.environ.get("RANK", "0") != "0":
            return 2  # rank 0 has the same faults and says them
        print(f"megatron-r1: {error}", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"megatron-r1: {error}", file=sys.stderr)
        return 1
    asked = command in ("run", "help", "-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def parse(words: Sequence[str]) -> StageConfig | PipelineConfig:
    """RECIPE, a file of fields over it or in its place, and the overrides as a configuration. Raises ConfigError for an
    unknown recipe and a field of earlier versions; tyro exits on an unknown field."""
    words, file = split_config(words)
    read = None if file is None else read_config_file(file)
    if words and words[0] == "evaluate":
        rest = answer_help("evaluate", EvaluateConfig, words[1:], meaning_of(EvaluateConfig))
        prog = "megatron-r1 evaluate"
        if read is None:
            return tyro.cli(EvaluateConfig, args=rest, prog=prog)
        return tyro.cli(EvaluateConfig, default=read.for_kind(EvaluateConfig), args=rest, prog=prog)
    word = words[0] if words and not words[0].startswith("-") else ""
    if not word and read is None:
        raise ConfigError(f"name a recipe first: {', '.join(RECIPES)}; or --config FILE")
    recipe = recipe_named(word) if read is None else read.over(word)
    if faults := renamed_faults(words, [field.name for field in dataclasses.fields(recipe)]):
        raise ConfigError(faults)
    recipe, rest = with_choices(recipe, words[1:] if word else words)
    about, start = about_recipe(word) if word else f"As {file} says.", word or f"--config {file}"
    rest = answer_help(f"run {start}", recipe, rest, about)
    try:
        return tyro.cli(type(recipe), default=recipe, args=rest, prog=f"megatron-r1 run {start}")
    except ConfigError:
        raise
    except Exception as error:  # a user's class refuses what it is given
        if not told(error).startswith(" at "):
            raise
        raise ConfigError(f"the command line cannot be used{told(error)}") from error


def _run(words: list[str]) -> int:
    words, options = split_options(words)
    if PARENT_VARIABLE not in os.environ:
        become_rank()
    config = parse(words)
    if "RANK" in os.environ and PARENT_VARIABLE not in os.environ:
        # Of a pipeline, which keeps its own folder, each stage's may move.
        folder = (
            config.run_dir / options.only if isinstance(config, PipelineConfig) and options.only else config.run_dir
        )
        if faults := moving_faults(words, folder):
            raise ConfigError(faults)
    if "RANK" not in os.environ and not options.dry_run and lacks_bytecode():
        print(f"megatron-r1: {bytecode_remedy()}", file=sys.stderr)
    if isinstance(config, PipelineConfig):
        return run_pipeline(config, words, options, recipe=recipe_word(words))
    options.only_for_pipelines()
    if "RANK" in os.environ and not options.dry_run:
        return run_here(config)
    shape = check(config)
    print(summary_of(config, shape), flush=True)
    if options.dry_run:
        print(describe_fields(config))
        return 0
    return run_stage(config, words)


def _plan(words: list[str]) -> int:
    from megatron_r1.planning.command import plan_folder, plan_stage, split_plan_options
    from megatron_r1.recipes import PACKAGED_SHAPES

    words, options = split_plan_options(words)
    if words and words[0] not in RECIPES and not words[0].startswith("-") and Path(words[0]).exists():
        return plan_folder(Path(words[0]), options)
    config = parse(words)
    if isinstance(config, PipelineConfig):
        raise ConfigError(f"{config.name} is a pipeline; plan a stage that is a recipe itself, such as grpo_671b")
    if faults := number_faults(config):
        raise ConfigError(faults)
    return plan_stage(needs_of(config), options, PACKAGED_SHAPES)


def _evaluate(words: list[str]) -> int:
    config = parse(["evaluate", *words])
    assert isinstance(config, EvaluateConfig)
    check(config)
    from megatron_r1.pipeline.folder import prepare_folder
    from megatron_r1.stages.evaluate.run import describe, evaluate

    with prepare_folder(config).lock:
        print(describe(evaluate(config)))
    print(f"results: {config.run_dir / 'results.json'}")
    return 0


def _check_data(words: list[str]) -> int:
    """Exit status 1 where there are faults."""
    from megatron_r1.config.check_data import CheckDataConfig
    from megatron_r1.pipeline.check_data import check_data, describe

    report = check_data(tyro.cli(CheckDataConfig, args=words, prog="megatron-r1 check-data"))
    print(describe(report))
    return 1 if report.faults else 0


def _report(words: list[str]) -> int:
    from megatron_r1.observe.index import report_on

    if len(words) > 1 or (words and words[0].startswith("-")):
        raise ConfigError(f"report takes one folder, not {' '.join(words)}: megatron-r1 report runs")
    print(f"report: {report_on(Path(words[0] if words else 'runs'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
