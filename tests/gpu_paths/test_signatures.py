"""Every argument that the trainer hands to Megatron-Core, against the signatures of the version that is installed.

Read from the source by AST, so that calls which only GPUs reach count too. Needs neither a GPU nor Transformer Engine;
`make test-megatron` runs it under every supported version.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_r1.config import ModelConfig, ParallelConfig, TrainConfig, load_shape
from megatron_r1.config.packages import has_module
from megatron_r1.config.schema import FP8Config
from megatron_r1.recipes.r1_tiny import STUDENT
from megatron_r1.recipes.tiny import TINY_V3

pytestmark = pytest.mark.gpu_paths
PACKAGE = Path(__file__).parents[2] / "megatron_r1"
FILES = sorted(path for name in ("model", "policy", "weights") for path in (PACKAGE / name).glob("*.py"))
SUBCLASSES = {"PolicyModel": ("megatron.core.models.gpt", "GPTModel")}
"""Ours that hand all they get to Megatron's."""


def megatron_names(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """The names that a file imports from Megatron: (module, name in it)."""
    found = dict(SUBCLASSES)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
            found |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
    return found


def resolve(module: str, name: str) -> object:
    imported = importlib.import_module(module)
    return getattr(imported, name) if hasattr(imported, name) else importlib.import_module(f"{module}.{name}")


def calls(path: Path) -> Iterator[tuple[str, Callable, ast.Call]]:
    """(where, what is called, the call) of each call of a Megatron name, or of an attribute of one."""
    tree = ast.parse(path.read_text())
    names = megatron_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        if not isinstance(owner, ast.Name) or owner.id not in names:
            continue
        called = resolve(*names[owner.id])
        if isinstance(node.func, ast.Attribute):
            called = getattr(called, node.func.attr)  # AttributeError: this version has no such function
        yield f"{path.relative_to(PACKAGE)}:{node.lineno}", called, node  # pyright: ignore[reportReturnType]


def bind(called: Callable, node: ast.Call) -> None:
    """TypeError if the call's arguments do not fit. What is behind a star is not known here."""
    positional = [None for argument in node.args if not isinstance(argument, ast.Starred)]
    named = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
    inspect.signature(called).bind_partial(*positional, **named)


def test_a_wrong_argument_is_found():
    from megatron.core.optimizer import OptimizerConfig

    with pytest.raises(TypeError, match="no_such_field"):
        bind(OptimizerConfig, ast.parse("OptimizerConfig(lr=1.0, no_such_field=1)").body[0].value)


def test_every_call_fits_its_signature():
    wrong, seen = [], 0
    for path in FILES:
        for where, called, node in calls(path):
            seen += 1
            try:
                bind(called, node)
            except TypeError as error:
                wrong.append(f"{where}: {called.__name__}: {error}")
    assert not wrong
    assert seen > 30


TRAINS = [
    TrainConfig(dtype="bf16", recompute="selective", deterministic=True),
    TrainConfig(dtype="bf16", recompute="full"),
    *(TrainConfig(dtype="fp8", fp8=FP8Config(recipe=recipe)) for recipe in ("blockwise", "tensorwise", "mxfp8")),
    TrainConfig(dtype="fp8", fp8=FP8Config(recipe="delayed", format="hybrid")),
    TrainConfig(dtype="fp8", fp8=FP8Config(first_layers_bf16=1, last_layers_bf16=1)),
]
TENSOR_PIPELINE = ParallelConfig(
    world_size=8, tensor=2, sequence=True, pipeline_parallel=2, virtual_pipeline=2, context=2
)
EXPERT = ParallelConfig(world_size=4, expert=2, expert_tensor=2)
MODELS = {
    "latent attention and experts": (TINY_V3, [ParallelConfig(), TENSOR_PIPELINE, EXPERT]),
    "dense": (STUDENT, [ParallelConfig(), TENSOR_PIPELINE]),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("transformer_engine", [False, True], ids=["local", "te"])
def test_every_field_of_the_configuration_is_megatrons(model, transformer_engine):
    """An unknown field is a TypeError of the dataclass. What the fields mean to each other is checked there too.

    Megatron asks for Transformer Engine's version where experts meet FP8."""
    from megatron_r1.model.transformer_config import transformer_config

    folder, layouts = MODELS[model]
    shape, config = load_shape(folder), ModelConfig(path=folder)
    without_fp8 = shape.moe is not None and not has_module("transformer_engine")
    for train in (train for train in TRAINS if not (without_fp8 and train.dtype == "fp8")):
        for parallel in layouts:
            made = transformer_config(shape, parallel, train, config, transformer_engine=transformer_engine)
            assert (made.fp8 is not None) == (train.dtype == "fp8")
            assert made.deterministic_mode == train.deterministic
