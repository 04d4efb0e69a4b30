"""A file imports only lower floors, and each heavy library is named in the folders that are its border.

Read from the source by AST, so that an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_r1"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

FLOORS = (
    ("types", "errors", "boxed", "syntax", "activations"),
    ("plugins", "bounds", "files", "parent", "gpus", "agreement"),
    ("algorithms",),
    ("config",),
    ("resharding",),
    ("observe", "planning"),
    ("data", "rewards"),
    ("model", "weights"),
    ("policy",),
    ("engines",),
    ("rollout",),
    ("cluster",),
    ("stages",),
    ("toy",),
    ("pipeline",),
    ("recipes", "diagnose"),
    ("doctor", "config_file"),
    ("__main__",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

NARROWER = {"recipes": {"algorithms", "config", "errors", "plugins", "stages", "toy"}}
"""Folders that may use less than their floor allows: the command line imports every recipe before torch."""

TABLES = ("weights/table.py", "weights/placement.py", "weights/regions.py")
"""The files of their folder that planning reads too: they have the sizes. They use config and resharding's boxes
alone."""
TABLE_MODULES = tuple(f"megatron_r1.{file.removesuffix('.py').replace('/', '.')}." for file in TABLES)

BORDERS = {"megatron": {"model", "weights", "policy"}, "vllm": {"engines/vllm"}}
KINDS_OF_ENGINE = {path.parent.name for path in PACKAGE.glob("engines/*/__init__.py")}
WITHOUT_TORCH = {
    "types",
    "activations",
    "syntax",
    "algorithms",
    "boxed",
    "plugins",
    "bounds",
    "files",
    "parent",
    "gpus",
    "errors",
    "config",
    "observe",
    "planning",
    "resharding",
    "data",
    "rewards",
    "recipes",
    "doctor",
    "config_file",
    "__main__",
}


def imports(source: str, file: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything that `source` imports, at any depth."""
    package = ["megatron_r1", *Path(file).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found += [(node.lineno, str(word.value)) for word in node.args[:1] if isinstance(word, ast.Constant)]
    return found


def faults(source: str, file: str) -> list[str]:
    own = Path(file).parts[0].removesuffix(".py")
    says_torch = own in ("algorithms", "data") and "torch" in (ast.get_docstring(ast.parse(source)) or "").lower()
    found = []
    for line, name in imports(source, file):
        where = f"{file}:{line} imports {name}"
        top, _, rest = name.partition(".")
        if top == "megatron_r1":
            other = rest.split(".")[0]
            if (own == "planning" or file in TABLES) and name.startswith(TABLE_MODULES):
                continue
            engine = re.match(r"engines\.(\w+)", rest)
            if file in TABLES and other not in ("config", "resharding"):
                found.append(f"{where}: the table uses config only")
            elif engine and engine[1] in KINDS_OF_ENGINE and not file.startswith(f"engines/{engine[1]}/"):
                found.append(f"{where}: an engine is known by its protocol, engines.base, and found by engines.chosen")
            elif other not in FLOOR_OF:
                found.append(f"{where}: {other!r} has no floor; add it to FLOORS")
            elif other != own and FLOOR_OF[other] >= FLOOR_OF[own]:
                found.append(f"{where}: {other} is not below {own}")
            elif own == "recipes" and other in ("stages", "toy") and rest.split(".")[2:3] != ["config"]:
                found.append(f"{where}: of a stage, recipes use its config only")
            elif other != own and own in NARROWER and other not in NARROWER[own]:
                found.append(f"{where}: {own} uses {', '.join(sorted(NARROWER[own]))} only")
        elif top in BORDERS and not any(file.startswith(f"{folder}/") for folder in BORDERS[top]):
            found.append(f"{where}: only {', '.join(sorted(BORDERS[top]))} may")
        elif top == "torch" and (own in WITHOUT_TORCH or file in TABLES) and not says_torch:
            found.append(f"{where}: {own} does without torch")
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_only_lower_floors(file):
    assert Path(file).parts[0].removesuffix(".py") in FLOOR_OF, f"{file} has no floor; add it to FLOORS"
    assert faults((PACKAGE / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source", "words"),
    [
        ("model/a.py", "from megatron_r1.policy.policy import Policy", "policy is not below model"),
        ("model/a.py", "from megatron_r1 import weights", "weights is not below model"),
        ("planning/a.py", "import megatron_r1.observe.metrics", "observe is not below planning"),
        ("data/a.py", "from ..rewards import math", "rewards is not below data"),
        (
            "recipes/a.py",
            "from megatron_r1.pipeline.kinds import check",
            "recipes uses algorithms, config, errors",
        ),
        (
            "recipes/a.py",
            "from megatron_r1.stages.grpo.run import run_grpo",
            "of a stage, recipes use its config only",
        ),
        (
            "stages/a.py",
            "def f():\n    from megatron.core import parallel_state",
            "only model, policy, weights may",
        ),
        ("planning/a.py", "from megatron_r1.weights.load import load_weights", "weights is not below planning"),
        ("weights/table.py", "import torch", "does without torch"),
        ("weights/table.py", "from megatron_r1.types import Problem", "the table uses config only"),
        ("stages/a.py", "import importlib\nimportlib.import_module('vllm.envs')", "only engines/vllm may"),
        ("engines/base.py", "from vllm.config import ModelConfig", "only engines/vllm may"),
        ("rollout/a.py", "from megatron_r1.engines.vllm.server import x", "an engine is known by its protocol"),
        ("stages/a.py", "def f():\n    import megatron_r1.engines.vllm.client", "an engine is known by its protocol"),
        ("rewards/a.py", "if TYPE_CHECKING:\n    import torch.nn", "rewards does without torch"),
        ("data/a.py", '"""Reads jsonl."""\nimport torch', "data does without torch"),
        ("data/a.py", "import megatron_r1.novelty", "has no floor"),
    ],
)
def test_a_breach_is_found(file, source, words):
    (fault,) = faults(source, file)
    assert words in fault


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/dali.py", '"""The one reader that gives torch tensors."""\nimport torch'),
        ("policy/a.py", "from megatron.core import parallel_state\nfrom megatron_r1.model.build import x"),
        (
            "planning/a.py",
            "from megatron_r1.weights.table import Entry\nfrom megatron_r1.config import GRPOConfig",
        ),
    ],
)
def test_what_is_allowed_is_not_a_breach(file, source):
    assert faults(source, file) == []


def test_a_configuration_is_checked_without_torch():
    code = (
        "import sys, tempfile, pathlib\n"
        "from megatron_r1.__main__ import main\n"
        "folder = pathlib.Path(tempfile.mkdtemp()) / 'run'\n"
        "assert main(['run', 'quickstart', '--dry-run', '--run-dir', str(folder)]) == 0\n"
        "assert main(['run', 'quickstart', '--grpo.group-size', '1', '--run-dir', str(folder)]) == 2\n"
        "assert main(['doctor']) in (0, 1)\n"
        "heavy = ('torch', 'transformers', 'vllm', 'megatron.core', 'reasoning_gym')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
