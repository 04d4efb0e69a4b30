"""Every config.json field: the logits are transformers', or the reader refuses the field by its name.

The fields are those of the transformers configuration classes that are installed, with their own defaults; each is
changed alone. Then the combinations that were once read as another model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_cases import ALTERNATIVES, BASES, COMBINATIONS, COMPUTED, config_of, make_model
from ranks import run_ranks

from megatron_r1.config.architectures import ARCHITECTURES
from megatron_r1.config.architectures.base import DEFAULTS
from megatron_r1.config.fields import config_fields, limited_fields
from megatron_r1.config.shape import ModelShape, shape_from_config
from megatron_r1.errors import ConfigError

TOKENS = 96


def own_fields(architecture: str) -> dict[str, Any]:
    """Names and defaults of the fields of the architecture's configuration class, inherited ones included."""
    from transformers import CONFIG_MAPPING

    fields = dataclasses.fields(CONFIG_MAPPING[architecture])
    return {field.name: field.default for field in fields if field.init and not field.name.startswith("_")}


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: (architecture, change of its base)."""
    found = {}
    for architecture in ARCHITECTURES:
        found[f"{architecture}: base"] = (architecture, {})
        for field, default in own_fields(architecture).items():
            usual = BASES[architecture].get(field, default)
            for value in ALTERNATIVES.get(field, []):
                if value != usual:
                    found[f"{architecture}: {field} {json.dumps(value)[:60]}"] = (architecture, {field: value})
        for name, change in COMBINATIONS[architecture].items():
            found[f"{architecture}: {name}"] = (architecture, change)
    return found


CASES = cases()


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[np.ndarray, np.ndarray | str]]:
    """By case: (transformers' logits, ours or an error's text). A refused case is absent.

    Cases with one shape and the same weights are one model to us, which runs once: what the reader left out of the
    shape can then show in transformers' logits only.
    """
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("fields")
    ids = np.random.default_rng(0).integers(0, 53, size=TOKENS)
    np.save(root / "ids.npy", ids)
    expected, folders, known = {}, {}, {}
    for name, (architecture, change) in CASES.items():
        config = config_of(architecture, change)
        shape = shape_or_error(config)
        if isinstance(shape, str):
            continue
        try:
            model = make_model(config)
            with torch.no_grad():
                expected[name] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        except Exception as error:
            expected[name] = f"transformers: {error!r}"
            continue
        same = (repr(shape), tuple(float(tensor.double().sum()) for tensor in model.state_dict().values()))
        folders[name] = known.setdefault(same, root / str(len(known)))
        if not folders[name].exists():
            model.save_pretrained(folders[name])
            (folders[name] / "config.json").write_text(json.dumps(config))
    run_ranks("config_fields.py", str(root), ranks=1)
    found = dict(np.load(root / "found.npz"))
    ours = {name: found.get(folder.name, said(folder)) for name, folder in folders.items()}
    return {name: (theirs, ours.get(name, "not run")) for name, theirs in expected.items()}


def said(folder: Path) -> str:
    file = folder / "error.txt"
    return file.read_text() if file.exists() else "no answer"


def shape_or_error(config: dict[str, Any]) -> ModelShape | str:
    try:
        return shape_from_config(config)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_transformers_or_the_field_is_refused(answers, name):
    architecture, change = CASES[name]
    shape = shape_or_error(config_of(architecture, change))
    if isinstance(shape, str):
        names: set[str] = {*change, *(key for value in change.values() if isinstance(value, dict) for key in value)}
        aliases = ARCHITECTURES[architecture].aliases
        assert any(field in shape or aliases.get(field, field) in shape for field in names) or "rope type" in shape
        return
    expected, found = answers[name]
    assert not isinstance(expected, str), expected
    assert not isinstance(found, str), found
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", [name for name in CASES if name.partition(": ")[2] in COMPUTED])
def test_what_transformers_computes_is_not_refused(name):
    assert not isinstance(shape_or_error(config_of(*CASES[name])), str)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_field_of_the_class_is_known(architecture):
    known = {field.name for field in config_fields(ARCHITECTURES[architecture])}
    fields = own_fields(architecture)
    assert not set(fields) - set(ALTERNATIVES), "transformers has new fields: give them values in config_cases.py"
    assert not set(fields) - known, "transformers has new fields: say in config/fields.py what becomes of them"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_the_classes_own(architecture):
    from transformers import CONFIG_MAPPING

    theirs = own_fields(architecture) | {"rope_theta": CONFIG_MAPPING[architecture].default_theta}
    ours = {**DEFAULTS, **ARCHITECTURES[architecture].defaults}
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_limited_fields_are_refused_by_name(architecture):
    for field, (built, _) in limited_fields(ARCHITECTURES[architecture]).items():
        for value in built:
            shape_from_config(config_of(architecture, {field: [value] * 2 if field == "layer_types" else value}))
        with pytest.raises(ConfigError, match=field):
            shape_from_config(config_of(architecture, {field: "another"}))
