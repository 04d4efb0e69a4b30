"""The command line from outside: its output, its exit statuses, and what becomes of an older run's folder."""

import json
import subprocess
import sys

import pytest

from megatron_r1.__main__ import main, parse
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.folder import prepare_folder
from megatron_r1.recipes import RECIPES


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "test"


def run(capsys, *words):
    """(exit status, stdout, stderr) of `megatron-r1 WORDS`."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as stop:  # tyro's way out of an unknown field
        status = stop.code
    caught = capsys.readouterr()
    return status, caught.out, caught.err


def test_a_dry_run_prints_derived_numbers_and_fields_and_writes_nothing(capsys, run_dir):
    status, out, err = run(
        capsys,
        "run",
        "tiny",
        "--dry-run",
        "--run-dir",
        run_dir,
        "--prompts-per-step",
        6,
        "--group-size",
        4,
    )
    assert (status, err) == (0, "")
    assert "deepseek_v3, 1.02M parameters" in out
    assert "2 rank(s), EP2, data parallel 2" in out
    assert "6 prompts x 4 = 24 samples" in out
    assert "  group_size = 4\n" in out
    assert f"  run_dir = {run_dir}\n" in out
    assert not run_dir.parent.exists()


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--algorithm.kl.coef", "0.01"], "algorithm.kl.coef", 0.01),
        (["--seed", "7"], "seed", 7),
        (["--parallel.sequence"], "parallel.sequence", True),
        (["--parallel.no-sequence"], "parallel.sequence", False),
        (["--rollout.sampling.max-new-tokens", "24"], "rollout.sampling.max_new_tokens", 24),
        (["--rollout.sampling.stop-token-ids", "5", "6"], "rollout.sampling.stop_token_ids", (5, 6)),
        (["--data.tasks", "gcd", "chain_sum:min_terms=2"], "data.tasks", ("gcd", "chain_sum:min_terms=2")),
        (["--optimizer.lr", "0.5"], "optimizer.lr", 0.5),
        (["--if-exists", "refuse"], "if_exists", "refuse"),
    ],
)
def test_an_override_reaches_its_field(words, path, value):
    found = parse(["tiny", *words])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_nothing_else_is_changed_by_an_override():
    import dataclasses

    changed = parse(["tiny", "--seed", "7"])
    assert dataclasses.replace(changed, seed=0) == RECIPES["tiny"]()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_reached_by_its_name(name):
    assert parse([name]) == RECIPES[name]()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["run", "nope"], 2, "no recipe is called 'nope'; there are quickstart"),
        (["run"], 2, "name a recipe first: quickstart"),
        (["run", "--dry-run"], 2, "name a recipe first"),
        (["run", "tiny", "--no-such-field", "1"], 2, "no-such-field"),
        (["run", "tiny", "--seed", "seven"], 2, "seven"),
        (["run", "tiny", "--if-exists", "overwrite"], 2, "overwrite"),
        (["fly"], 2, "usage: megatron-r1 run RECIPE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_status_2_with_a_reason(capsys, words, status, message):
    found, _, err = run(capsys, *words)
    assert found == status
    assert message in err


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_help_is_status_0(capsys, words):
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert "usage: megatron-r1 run RECIPE" in out


@pytest.mark.parametrize(
    "words",
    [
        ["run", "tiny", "--rollout.request-timeout-seconds", "60"],
        ["run", "r1_671b", "--final-rl.rollout.request_timeout_seconds=60"],
    ],
)
def test_an_option_of_earlier_versions_is_refused_with_what_to_say_instead(capsys, words):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert words[2].partition("=")[0] in said and "set rollout.stall_seconds" in said


def test_the_fields_of_a_recipe_are_listed(capsys):
    status, out, _ = run(capsys, "run", "tiny", "--help-all")
    assert status == 0
    assert "--algorithm.kl.coef" in out and "--algorithm NAME" in out


def test_recipes_are_listed_with_their_purpose(capsys):
    status, out, _ = run(capsys, "recipes")
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines.keys() == RECIPES.keys()
    assert lines["grpo_671b"].startswith("DeepSeek-V3-Base to R1-Zero")


def test_faults_are_listed_together_with_status_2(capsys, run_dir):
    status, out, err = run(
        capsys,
        *("run", "tiny", "--run-dir", run_dir),
        *("--group-size", 1, "--data.holdout", 0, "--rollout.sampling.temperature", 0.0),
    )
    assert status == 2
    assert "the configuration has 3 faults:" in err
    for field in ("group_size is 1", "data.holdout is 0", "rollout.sampling.temperature is 0.0"):
        assert f"  - {field}" in err
    assert "Traceback" not in err and out == ""
    assert not run_dir.exists()


def test_an_older_run_is_refused_before_anything_starts(capsys, run_dir):
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text("older")
    status, _, err = run(capsys, "run", "tiny", "--run-dir", run_dir, "--if-exists", "refuse")
    assert status == 2
    assert f"{run_dir} is not empty" in err and "--if-exists archive" in err
    assert (run_dir / "run.json").read_text() == "older"


def test_a_dry_run_leaves_an_older_run_in_its_place(capsys, run_dir):
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text("older")
    status, _, _ = run(capsys, "run", "tiny", "--dry-run", "--run-dir", run_dir, "--if-exists", "archive")
    assert status == 0
    assert (run_dir / "run.json").read_text() == "older"
    assert [path.name for path in run_dir.parent.iterdir()] == ["test"]


def test_older_runs_are_archived_under_the_next_free_number(run_dir):
    config = parse(["tiny", "--run-dir", str(run_dir), "--seed", "1"])
    with prepare_folder(config).lock, pytest.raises(ConfigError, match="another run has just started"):
        prepare_folder(config)
    second = parse(["tiny", "--run-dir", str(run_dir), "--seed", "2"])
    prepared = prepare_folder(second)
    assert prepared.moved == run_dir.with_name("test.1")
    prepared.lock.close()
    third = parse(["tiny", "--run-dir", str(run_dir), "--seed", "3"])
    prepared = prepare_folder(third)
    assert prepared.moved == run_dir.with_name("test.2")
    prepared.lock.close()
    seeds = [
        json.loads((run_dir.with_name(name) / "run.json").read_text())["config"]["seed"]
        for name in ("test.1", "test.2", "test")
    ]
    assert seeds == [1, 2, 3]


def test_an_empty_folder_is_used_as_it_is(run_dir):
    run_dir.mkdir(parents=True)
    prepared = prepare_folder(parse(["tiny", "--run-dir", str(run_dir)]))
    assert prepared.moved is None
    prepared.lock.close()
    assert [path.name for path in run_dir.parent.iterdir()] == ["test"]


def test_run_json_holds_the_resolved_configuration(run_dir):
    prepare_folder(parse(["tiny", "--run-dir", str(run_dir), "--algorithm.kl.coef", "0.25"])).lock.close()
    saved = json.loads((run_dir / "run.json").read_text())
    assert saved["name"] == "tiny"
    assert saved["config"]["algorithm"]["kl"]["coef"] == 0.25
    assert saved["config"]["run_dir"] == str(run_dir)


def test_the_module_is_the_command_and_returns_its_status(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1", "run", "nope"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-r1: ") and "no recipe is called 'nope'" in done.stderr


def test_a_recipe_must_come_before_its_fields():
    with pytest.raises(ConfigError, match="name a recipe first"):
        parse(["--seed", "1", "tiny"])


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_under_an_outer_launcher_each_rank_checks_and_rank_0_alone_speaks(capsys, monkeypatch, run_dir, rank, says):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("MEGATRON_R1_PARENT", raising=False)
    status, _, err = run(capsys, "run", "tiny", "--run-dir", run_dir, "--group-size", 1)
    assert status == 2
    assert ("group_size is 1" in err) == says
    assert not run_dir.exists()
