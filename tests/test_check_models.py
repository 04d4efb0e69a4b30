"""docs/models.md says what the tables say, and the tool that writes it tells a right model from a wrong one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import check_models
import model_fields
import numpy as np
import pytest
from published_models import PUBLISHED, tiny

from megatron_r1.config.shape import shape_from_config

ROOT = Path(__file__).parent.parent


def test_the_lists_of_fields_are_current():
    page = (ROOT / "docs" / "models.md").read_text()
    assert model_fields.fields_text() in page, "docs/models.md is stale: python tools/check_models.py --fields"


def test_every_published_model_has_a_row():
    page = (ROOT / "docs" / "models.md").read_text()
    table = page.partition("<!-- table:")[2].partition("<!-- end of table")[0].strip().splitlines()[3:]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table]
    assert rows == [*PUBLISHED], "docs/models.md is stale: python tools/check_models.py --serve --write"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_and_their_narrow_forms_compute_alike(name):
    """Sizes aside, the narrow shape is the published one."""
    whole, narrow = shape_from_config(PUBLISHED[name]), shape_from_config(tiny(PUBLISHED[name]))
    for field in ("architecture", "norm_eps", "tie_embeddings", "qkv_bias", "output_bias", "qk_norm", "num_mtp_layers"):
        assert getattr(narrow, field) == getattr(whole, field)
    assert (narrow.rope.kind, narrow.rope.theta) == (whole.rope.kind, whole.rope.theta)
    changed = {key for key, value in whole.rope.factors.items() if narrow.rope.factors[key] != value}
    assert changed <= {"original_max_position_embeddings"}
    if whole.moe is not None and narrow.moe is not None:
        sizes = {"num_experts": 0, "expert_ffn_size": 0, "dense_layers": frozenset()}
        assert dataclasses.replace(whole.moe, **sizes) == dataclasses.replace(narrow.moe, **sizes)


@pytest.mark.parametrize("missing", model_fields.MISSING, ids=lambda each: each.model_type)
def test_what_is_missing_is_refused_and_is_in_transformers_class(missing):
    """A config.json of the class's own defaults: refused by its model_type."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[missing.model_type]()
    fields = made.to_dict()
    assert set(missing.shown_by) <= {*fields, *(field.name for field in dataclasses.fields(made))}
    with pytest.raises(ValueError, match=missing.model_type) as caught:
        shape_from_config(fields)
    assert str(caught.value).endswith(model_fields.refusal(missing.model_type))


@pytest.mark.slow
def test_the_tool_on_two_models(tmp_path):
    """As the command does it; then with one weight changed behind its back, which it must see."""
    names = ("Moonlight-16B-A3B", "Qwen2.5-0.5B")
    found = check_models.check({name: PUBLISHED[name] for name in names}, tmp_path, serve=False)
    for each in found.values():
        assert each["difference"] < 1e-5 < each["largest"] and each["returns"]
        assert each["after"] < each["before"] and each["norm"] > 0
    assert "NOT EQUAL" not in check_models.rows(found)
    for folder in tmp_path.iterdir():
        config = json.loads((folder / "model" / "config.json").read_text())
        changed = config | {"rms_norm_eps": 1e-2}
        (folder / "model" / "config.json").write_text(json.dumps(changed))
    subprocess.run([sys.executable, ROOT / "tools" / "check_models.py", "--worker", tmp_path], check=True)
    for folder in tmp_path.iterdir():
        assert np.abs(np.load(folder / "found.npy") - np.load(folder / "expected.npy")).max() > 1e-3
