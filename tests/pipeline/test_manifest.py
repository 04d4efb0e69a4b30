"""When a stage is up to date, by its configuration and by the content of what it reads and writes."""

import dataclasses
import json
import os

import pytest

from megatron_r1.config.paths import replace_inputs
from megatron_r1.config.schema import DataConfig, RunningServerConfig
from megatron_r1.errors import DataError
from megatron_r1.pipeline.manifest import Manifest
from megatron_r1.stages.evaluate.config import EvaluateConfig


@pytest.fixture
def stage(tmp_path):
    """A finished stage: what it read, what it wrote."""
    (tmp_path / "made" / "model").mkdir(parents=True)
    (tmp_path / "made" / "model" / "config.json").write_text("{}")
    (tmp_path / "problems.jsonl").write_text("one\n")
    config = EvaluateConfig(
        run_dir=tmp_path / "score",
        model=tmp_path / "made" / "model",
        data=DataConfig(files=(tmp_path / "problems.jsonl",)),
    )
    config.run_dir.mkdir()
    manifest = Manifest(tmp_path, "test")
    manifest.begin("score", config)
    (config.run_dir / "results.json").write_text('{"scores": 1}')
    (config.run_dir / "summary.json").write_text('{"accuracy": 0.5}')
    manifest.finish("score", config, seconds=1.0, status=0)
    return config


def current(stage, tmp_path):
    return Manifest(tmp_path, "test").is_current("score", stage)


def test_a_finished_stage_is_current(stage, tmp_path):
    assert current(stage, tmp_path)


def test_a_stage_that_never_ran_is_not(stage, tmp_path):
    assert not Manifest(tmp_path, "test").is_current("other", stage)


@pytest.mark.parametrize("fields", [{"samples": 3}, {"seed": 1}, {"limit": 2}])
def test_another_configuration_is_not(stage, tmp_path, fields):
    assert not current(dataclasses.replace(stage, **fields), tmp_path)


def test_name_and_what_to_do_with_old_folders_are_no_part_of_the_computation(stage, tmp_path):
    assert current(dataclasses.replace(stage, name="renamed", if_exists="archive"), tmp_path)


def test_a_changed_input_file_is_noticed(stage, tmp_path):
    (tmp_path / "problems.jsonl").write_text("two\n")
    assert not current(stage, tmp_path)


def test_an_input_that_was_only_touched_is_the_same(stage, tmp_path):
    os.utime(tmp_path / "problems.jsonl", (1, 1))
    assert current(stage, tmp_path)


def test_a_file_more_in_an_input_folder_is_noticed(stage, tmp_path):
    (tmp_path / "made" / "model" / "more.safetensors").write_bytes(b"x")
    assert not current(stage, tmp_path)


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_an_output_that_is_not_what_the_stage_left_is_noticed(stage, tmp_path, how):
    results = stage.run_dir / "results.json"
    results.write_text('{"scores": 2}') if how == "changed" else results.unlink()
    assert not current(stage, tmp_path)


def test_a_stage_that_began_again_or_failed_is_not_current(stage, tmp_path):
    manifest = Manifest(tmp_path, "test")
    manifest.begin("score", stage)
    assert not current(stage, tmp_path)
    manifest.finish("score", stage, seconds=1.0, status=3)
    assert not current(stage, tmp_path)
    assert Manifest(tmp_path, "test").record("score")["exit_status"] == 3


def test_an_unfinished_stage_has_the_same_origin_until_an_input_changes(stage, tmp_path):
    manifest = Manifest(tmp_path, "test")
    manifest.begin("score", stage)
    assert Manifest(tmp_path, "test").same_origin("score", stage)
    (tmp_path / "problems.jsonl").write_text("two\n")
    assert not Manifest(tmp_path, "test").same_origin("score", stage)
    assert not manifest.same_origin("never", stage)


def test_the_record_says_what_was_made_of_what(stage, tmp_path):
    record = json.loads((tmp_path / "manifest.json").read_text())["stages"]["score"]
    assert record["state"] == "done" and record["metrics"] == {"accuracy": 0.5}
    assert record["inputs"]["model"]["stage"] == "made"
    assert record["inputs"]["data.files[0]"]["stage"] is None
    assert record["config"]["samples"] == 16
    assert record["code"]["version"]
    assert len(record["outputs"]["results.json"]["content"]) == 64


def test_a_pipeline_that_was_moved_is_current(stage, tmp_path):
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    config = replace_inputs(stage, lambda path: moved / path.relative_to(tmp_path))
    config = dataclasses.replace(config, run_dir=moved / "score")
    assert Manifest(moved, "test").is_current("score", config)
    (moved / "problems.jsonl").write_text("two\n")
    assert not Manifest(moved, "test").is_current("score", config)


def test_a_file_whose_time_was_set_back_is_read_again(stage, tmp_path):
    file = tmp_path / "problems.jsonl"
    before = file.stat()
    file.write_text("two\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not current(stage, tmp_path)


def test_a_stage_that_left_no_output_is_not_current(stage, tmp_path):
    (stage.run_dir / "results.json").unlink()
    Manifest(tmp_path, "test").finish("score", stage, seconds=1.0, status=0)
    assert not current(stage, tmp_path)


@pytest.mark.parametrize("text", ["null", "[1]", '{"stages": []}', '{"stages": {"score": {"state": "done"}}}'])
def test_what_is_no_manifest_is_said(stage, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: not a pipeline's manifest"):
        Manifest(tmp_path, "test")


def test_nothing_of_a_servers_token_is_recorded(stage, tmp_path):
    (tmp_path / "token").write_text("secret")
    server = RunningServerConfig(url="http://127.0.0.1:1", model="judge", token_file=tmp_path / "token")
    stage = dataclasses.replace(stage, server=server)
    manifest = Manifest(tmp_path, "test")
    manifest.begin("score", stage)
    assert "server.token_file" not in manifest.record("score")["inputs"]
    (tmp_path / "token").write_text("renewed")
    assert manifest.same_origin("score", stage)


def test_a_damaged_manifest_is_said_and_kept(stage, tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: not valid JSON"):
        Manifest(tmp_path, "test")
    assert (tmp_path / "manifest.json").read_text() == "{"


def test_a_file_behind_a_link_to_a_folder_counts(stage, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.safetensors").write_text("a")
    (stage.model / "weights").symlink_to(shards)
    before = Manifest(tmp_path, "test").content(stage.model)
    (shards / "a.safetensors").write_text("b")
    assert Manifest(tmp_path, "test").content(stage.model) != before


def test_another_pipeline_may_not_have_the_folder(stage, tmp_path):
    with pytest.raises(DataError, match=r"of the pipeline test, this is other; choose another --run-dir"):
        Manifest(tmp_path, "other")


def test_long_reading_shows_how_far_it_is(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_r1.pipeline.manifest.SHOWN_BYTES", 3)
    (stage.model / "weights").write_text("12345678")
    manifest = Manifest(tmp_path, "test")
    manifest.content(stage.model)
    assert "reading" in capsys.readouterr().out
    manifest.content(stage.model)  # known by now
    assert capsys.readouterr().out == ""


def test_stages_that_run_side_by_side_do_not_lose_each_others_records(stage, tmp_path):
    """On a cluster each has a manifest of its own in memory."""
    one, other = Manifest(tmp_path, "test"), Manifest(tmp_path, "test")
    one.begin("left", stage)
    other.begin("right", stage)
    one.finish("left", stage, seconds=1.0, status=1)
    last = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert {name: record["state"] for name, record in last.items()} == {
        "score": "done",
        "left": "failed",
        "right": "running",
    }
