"""--config FILE: what a run wrote runs again, a TOML sets fields, and what does not fit is said by its path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from megatron_r1.__main__ import main, parse
from megatron_r1.algorithms import DAPO
from megatron_r1.config import overlay
from megatron_r1.config.pipeline import PipelineConfig, stages_of
from megatron_r1.config.same import as_json
from megatron_r1.config.schema import StageConfig
from megatron_r1.config_file import read_config_file
from megatron_r1.errors import ConfigError
from megatron_r1.observe.metrics import plain_json
from megatron_r1.pipeline.folder import prepare_folder
from megatron_r1.pipeline.kinds import kind_of
from megatron_r1.pipeline.options import moving_faults, words_after_move
from megatron_r1.recipes import RECIPES


def stages(name: str) -> dict[str, StageConfig]:
    made = RECIPES[name]()
    if not isinstance(made, PipelineConfig):
        return {name: made}
    return {f"{name} {stage}": config for stage, config in stages_of(made).items()}


STAGES = {name: stage for recipe in RECIPES for name, stage in stages(recipe).items()}


def file_of(tmp_path: Path, text: str, name: str = "mine.toml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_writes_is_the_same_stage_again(tmp_path, name):
    stage = STAGES[name]
    written = {"name": stage.name, "kind": kind_of(stage).name, "config": plain_json(as_json(stage)), "inputs": {}}
    file = file_of(tmp_path, json.dumps(written), "run.json")
    assert parse(["--config", file]) == stage


def test_a_field_of_an_older_run_is_refused_with_what_to_say_instead(tmp_path):
    (stage,) = stages("tiny").values()
    config = plain_json(as_json(stage))
    del config["algorithm"]["correction"]
    config["algorithm"]["truncated_importance_cap"] = 2.0
    file = file_of(tmp_path, json.dumps({"kind": "GRPO", "config": config}), "run.json")
    with pytest.raises(ConfigError) as refused:
        parse(["--config", file])
    (fault,) = refused.value.faults
    field, remedy = "algorithm.truncated_importance_cap", "set weight to token and high to the cap, or leave it out"
    assert fault == f"{file}: {field}: now algorithm.correction: {remedy} where the cap was 0"


@pytest.mark.parametrize("name", [name for name in RECIPES if isinstance(RECIPES[name](), PipelineConfig)])
def test_what_a_pipeline_writes_is_the_same_pipeline_again(tmp_path, name):
    changed = parse([name, "--seed", "7", "--run-dir", "elsewhere"])
    file = file_of(tmp_path, json.dumps({"recipe": name, "config": plain_json(as_json(changed))}), "pipeline.json")
    assert parse(["--config", file]) == changed != RECIPES[name]()


def test_the_run_json_in_a_folder_is_such_a_file(tmp_path):
    config = parse(["tiny", "--run-dir", str(tmp_path / "run"), "--steps", "3", "--algorithm", "dapo"])
    prepare_folder(config).lock.close()
    assert parse(["--config", str(tmp_path / "run" / "run.json")]) == config


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = file_of(tmp_path, 'recipe = "tiny"\nseed = 3\nsteps = 4\noptimizer.lr = 1e-3\n')
    config = parse(["--config", file, "--steps", "9"])
    assert (config.seed, config.steps, config.optimizer.lr) == (3, 9, 1e-3)
    assert config.data == RECIPES["tiny"]().data
    assert parse(["tiny", "--config", file, "--steps", "9"]) == config


def test_tables_lists_dashes_and_paths(tmp_path):
    file = file_of(
        tmp_path,
        """
        [grpo]
        checkpoint-every = 7
        data.files = ["a.jsonl", "b.jsonl"]
        [[grpo.rewards.preferences]]
        name = "helpful"
        model = "folder"
        domains = ["chat"]
        """,
    )
    grpo = parse(["quickstart", "--config", file]).grpo
    assert grpo.checkpoint_every == 7
    assert grpo.data.files == (Path("a.jsonl"), Path("b.jsonl"))
    (helpful,) = grpo.rewards.preferences
    assert (helpful.name, helpful.model, helpful.domains) == ("helpful", Path("folder"), ("chat",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('algorithm = "dapo"', DAPO()),
        ('algorithm = {name = "dapo", sampling-rounds = 7}', DAPO(sampling_rounds=7)),
        ("algorithm.deviation_floor = 0.5", replace(RECIPES["grpo_qwen_1_5b"]().algorithm, deviation_floor=0.5)),
    ],
)
def test_an_algorithm_is_a_name_or_a_table(tmp_path, text, expected):
    assert parse(["grpo_qwen_1_5b", "--config", file_of(tmp_path, text)]).algorithm == expected


def test_an_algorithm_of_the_users_own_file_is_found_again_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine_again.py").write_text(
        "from dataclasses import dataclass\nfrom megatron_r1.algorithms.grpo import GRPO\n"
        "@dataclass(frozen=True, slots=True, kw_only=True)\nclass Mine(GRPO):\n    strength: float = 2.0\n"
    )
    monkeypatch.chdir(tmp_path / "there")
    config = parse(["tiny", "--run-dir", "run", "--algorithm", "mine_again.py:Mine", "--algorithm.strength", "3.0"])
    prepare_folder(config).lock.close()
    said = "from megatron_r1.__main__ import parse; print(parse(['--config', 'there/run/run.json']).algorithm.strength)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", said], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "3.0", done.stderr


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps = true", "steps is true; it must be: whole number"),
        ('steps = "5"', 'steps is "5"; it must be: whole number'),
        ("steps = 5.0", "steps is 5.0; it must be: whole number"),
        ("steps = 2026-11-29", "steps is"),
        ("stepps = 5", "stepps: there is no such field at the top; did you mean steps?"),
        ("optimizer = 3", "optimizer is 3; it must be: a table of fields: lr, "),
        ("train.lr = 1.0", "train.lr: there is no such field in train; did you mean optimizer.lr?"),
        ("rewards.preferences = 3", "rewards.preferences is 3; it must be: a list of tables with name, "),
        (
            'rewards.preferences = [{name = "x", domains = ["a"]}]',
            "rewards.preferences.0.model is missing; it has no default",
        ),
        (
            'rewards.preferences = [{name = "x", domains = ["a"], model = "y", modell = "y"}]',
            "rewards.preferences.0.modell: there is no such field",
        ),
        ('data.files = "one.jsonl"', 'data.files is "one.jsonl"; it must be: any number of: path'),
        ('algorithm = "dapoo"', "algorithm: no algorithm is called 'dapoo'"),
        ('algorithm = ["dapo"]', 'algorithm is ["dapo"]; it must be: a name, such as "dapo", or a table with name'),
        ("algorithm.sampling_rounds = 3", "algorithm.sampling_rounds: there is no such field in algorithm; "),
        ('if_exists = "maybe"', 'if_exists is "maybe"; it must be: refuse or archive or resume'),
        ("parallel.pipeline = 2", "parallel.pipeline: now parallel.pipeline_parallel"),
        ('kind = "SFT"', "it is of kind SFT, recipe tiny is GRPO"),
        ('recipe = "quickstart"', "it is for recipe quickstart, the command says tiny; leave one out"),
        ("recipe = 3", "recipe is 3; it must be a name in quotes"),
        ("steps = ", "is not TOML: "),
        ('run-dir = "a"\nrun_dir = "b"', "run-dir stands twice, with - and with _"),
        ("optimizer.learning_rat = 1.0", "optimizer.learning_rat: there is no such field in optimizer"),
    ],
)
def test_a_fault_names_the_file_and_the_field(tmp_path, text, fault):
    with pytest.raises(ConfigError) as error:
        parse(["tiny", "--config", file_of(tmp_path, text)])
    (found,) = error.value.faults
    assert "mine.toml" in found
    assert fault in found


def test_all_faults_of_a_file_are_said_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        parse(["tiny", "--config", file_of(tmp_path, "steps = true\nstepps = 5\ndata.seed = 1.5\n")])
    assert len(error.value.faults) == 3


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--config"], "--config needs a file"),
        (["--config", "--steps"], "--config needs a file"),
        (["--config", "a.toml", "--config=b.toml"], "--config is given twice"),
        (["--config", "absent.toml"], "absent.toml: No such file"),
        (["--config", "mine.yaml"], "must end in .toml or .json"),
        (["--config", "runs"], "runs is a folder; name a file, such as runs/run.json"),
        (["--config", "list.json"], "expected a table of fields at the top"),
        (["--config", "torn.json"], "torn.json is not JSON"),
        (["--config", "old.json"], "was written by an earlier version"),
        (["--config", "strange.json"], "kind is 'PPO'; it must be one of GRPO, SFT"),
        (["--config", "bare.toml"], "it names neither recipe nor kind"),
        (["--config", "latin.toml"], "latin.toml is not TOML"),
        (["--config", "twice.json"], "'seed' stands twice in one table"),
        (["--config", "deep.json"], "deep.json is not JSON"),
        (["--config", "beside.json"], "run_dir stands beside config; fields belong inside it"),
    ],
)
def test_a_file_that_cannot_be_used_is_status_2(tmp_path, monkeypatch, capsys, words, fault):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine.yaml").write_text("a: 1")
    for name in ("a", "b", "bare"):
        file_of(tmp_path, "steps = 3", f"{name}.toml")
    for name, text in (("runs/run", "{}"), ("list", "[]"), ("torn", '{"kind": '), ("old", '{"config": {}}')):
        file_of(tmp_path, text, f"{name}.json")
    file_of(tmp_path, '{"kind": "PPO", "config": {}}', "strange.json")
    file_of(tmp_path, '{"kind": "GRPO", "seed": 1, "seed": 2}', "twice.json")
    file_of(tmp_path, "[" * 100_000, "deep.json")
    file_of(tmp_path, '{"kind": "GRPO", "config": {"steps": 1}, "run_dir": "x"}', "beside.json")
    (tmp_path / "latin.toml").write_bytes('name = "ü"'.encode("latin-1"))
    assert main(["run", *words]) == 2
    assert fault in capsys.readouterr().err


def test_what_has_no_default_may_come_from_the_file_or_the_command_line(tmp_path):
    file = file_of(tmp_path, 'model = "some/model"\ndata.files = ["a.jsonl"]\n')
    config = parse(["evaluate", "--config", file, "--run-dir", "out"])
    assert (config.model, config.run_dir) == (Path("some/model"), Path("out"))
    with pytest.raises(SystemExit):  # tyro: --run-dir is required
        parse(["evaluate", "--config", file])


def test_an_evaluation_takes_no_other_kind(tmp_path):
    with pytest.raises(ConfigError, match="it is of SFT"):
        parse(["evaluate", "--config", file_of(tmp_path, 'kind = "SFT"')])


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b'\xef\xbb\xbfrecipe = "tiny"\nsteps = 6\n')
    assert parse(["--config", str(tmp_path / "mine.toml")]).steps == 6


def test_a_file_in_the_folder_that_is_moved_aside_is_found_there():
    words = ["--config", "runs/mine/run.json", "--steps", "3"]
    moved = words_after_move(words, Path("runs/mine"), Path("runs/mine.1"))
    assert moved == ["--steps", "3", "--config", "runs/mine.1/run.json"]
    assert words_after_move(words, Path("runs/other"), Path("runs/other.1")) == words
    around = ["--config", "runs/other/../mine/run.json"]
    assert words_after_move(around, Path("runs/mine"), Path("runs/mine.1")) == ["--config", "runs/mine.1/run.json"]


def test_what_a_users_class_refuses_names_its_field(tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "from dataclasses import dataclass\nfrom megatron_r1.algorithms.grpo import GRPO\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Picky(GRPO):\n    scale: float = 1.0\n"
        "    def __post_init__(self):\n        if self.scale > 2:\n            raise ValueError('scale too big')\n"
    )
    monkeypatch.chdir(tmp_path)
    file = file_of(tmp_path, 'algorithm = {name = "picky.py:Picky", scale = 9.0}')
    with pytest.raises(ConfigError, match=r"mine.toml: algorithm at .*picky.py:8: ValueError: scale too big"):
        parse(["tiny", "--config", file])


def test_where_several_nodes_read_it_the_file_must_not_be_moved_aside(capsys, monkeypatch, tmp_path):
    config = parse(["tiny", "--run-dir", str(tmp_path / "run")])
    prepare_folder(config).lock.close()
    words = ["--config", str(tmp_path / "run" / "run.json")]
    assert moving_faults(words, tmp_path / "elsewhere") == []
    monkeypatch.setenv("RANK", "0")
    assert main(["run", *words]) == 2
    assert "copy the file elsewhere first" in capsys.readouterr().err


def test_missing_values_stand_where_neither_file_nor_class_has_one():
    made = overlay.overlaid(type(RECIPES["tiny"]()), None, {}, missing=tyro.MISSING)
    assert made.run_dir is tyro.MISSING


def test_every_kind_can_be_named_by_a_file(tmp_path):
    for stage in STAGES.values():
        file = file_of(tmp_path, f'kind = "{kind_of(stage).name}"')
        assert type(read_config_file(Path(file)).over("")) is type(stage)
