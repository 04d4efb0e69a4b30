"""No answer of a model is run as code: which datasets may grade, checked against the installed source."""

import ast
import importlib.util
from fractions import Fraction
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_r1.config import gym_tasks
from megatron_r1.errors import ConfigError
from megatron_r1.rewards import gym, math_grader
from megatron_r1.rewards.pool import GradingPool

ROOT = Path(reasoning_gym.__file__).parent
EVALUATORS = frozenset(
    [
        "eval",
        "exec",
        "compile",
        "__import__",
        "parse_expr",
        "sympify",
        "lambdify",
        "parse_latex",
        "import_module",
        "run_module",
        "run_path",
        "literal_eval",
        "system",
        "popen",
        "Popen",
        "check_output",
    ]
)
METHODS_OF_THE_SAME_NAME = frozenset(["compile"])  # re.compile, and the brainfuck compiler's own
LOADERS = frozenset(["sympy", "pickle", "subprocess", "os", "marshal", "ctypes", "code", "runpy", "shelve", "dill"])
SYMPY_MAKES_ENTRIES_ONLY = frozenset(["advanced_geometry", "polynomial_equations", "simple_equations"])
"""Their modules import sympy; their scorers use float() and string equality."""


def file_of(module):
    path = ROOT.parent.joinpath(*module.split("."))
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


def imports(node, package):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = (
            importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
        )
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return []


def evaluators_in(module, seen):
    """Calls and imports in a module's source, and in what it imports of reasoning-gym, that could run a text."""
    path = file_of(module)
    # The package itself imports every dataset; a dataset that imports it uses the submodules it names.
    if path is None or module in seen or module == "reasoning_gym":
        return set()
    seen.add(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "id", None) or getattr(function, "attr", "")
            is_method = isinstance(function, ast.Attribute) and name in METHODS_OF_THE_SAME_NAME
            if name in EVALUATORS and not is_method:
                found.add(name)
        for imported in imports(node, package):
            if imported.split(".")[0] in LOADERS:
                found.add(imported.split(".")[0])
            if imported.startswith("reasoning_gym"):
                found |= evaluators_in(imported, seen)
    return found


def found_in(dataset):
    return evaluators_in(DATASETS[dataset][0].__module__, set())


def test_the_scan_finds_what_is_there():
    assert "eval" in found_in("spiral_matrix")
    assert {"parse_expr", "sympy"} <= found_in("countdown")
    assert "exec" in found_in("codeio")
    assert not found_in("chain_sum")
    assert not found_in("bf")


def test_every_dataset_was_judged_once():
    groups = (gym_tasks.READ, set(gym_tasks.ANSWER_GRAMMARS), gym_tasks.ARITHMETIC, set(gym_tasks.REFUSED))
    assert set().union(*groups) == set(DATASETS)
    assert sum(len(group) for group in groups) == len(DATASETS)


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_dataset_whose_source_evaluates_is_refused_or_guarded(dataset):
    found = found_in(dataset)
    if dataset in SYMPY_MAKES_ENTRIES_ONLY:
        assert found == {"sympy"}
    elif found:
        assert (
            dataset in gym_tasks.REFUSED or dataset in gym_tasks.ANSWER_GRAMMARS or dataset in gym_tasks.ARITHMETIC
        ), found


def test_other_release_is_refused(monkeypatch):
    assert gym_tasks.refusal("chain_sum") is None
    monkeypatch.setattr(gym_tasks, "READ_VERSION", "0.0.1")
    assert "install reasoning-gym==0.0.1" in gym_tasks.refusal("chain_sum")


def test_unread_dataset_is_refused():
    assert "nobody has read" in gym_tasks.refusal("a_new_dataset")


@pytest.mark.parametrize(
    ("dataset", "answer", "seen"),
    [
        ("basic_arithmetic", "-17", True),
        ("basic_arithmetic", "8+9", False),
        ("bitwise_arithmetic", "0xfF", True),
        ("bitwise_arithmetic", "print(1)", False),
        ("number_sorting", "['-1', '2.5']", True),
        ("number_sorting", "[NaN, NaN]", False),
        ("gsm_symbolic", "18", True),
        ("gsm_symbolic", "-18", False),
        ("gsm_symbolic", "18 or 17", False),
        ("complex_arithmetic", "3.0 - 2.0i", True),
        ("complex_arithmetic", "nan", False),
        ("propositional_logic", "(¬P ∨ Q)", True),
        ("propositional_logic", "__import__", False),
        ("chain_sum", "anything", True),
        ("spiral_matrix", "1 2 3", False),
        ("countdown", "1+1", False),
    ],
)
def test_what_a_scorer_may_see(dataset, answer, seen):
    assert gym.may_be_scored(dataset, answer) is seen


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1+2*3", 7, [1, 2, 3]),
        (" (1 + 2) * 3 ", 9, [1, 2, 3]),
        ("8/3/(1/3)", 8, [8, 3, 1, 3]),
        ("-3 + 5", 2, [3, 5]),
        ("5/2", Fraction(5, 2), [5, 2]),
        ("(" * 40 + "7" + ")" * 40, 7, [7]),
    ],
)
def test_arithmetic_is_exact(text, value, numbers):
    assert gym.arithmetic(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "2**9",
        "9//2",
        "1/0",
        "2 3",
        "(1)(2)",
        "1+",
        "",
        "()",
        "x+1",
        "1_0",
        "1e3",
        "1.5",
        "0x10",
        "007",
        "1,2",
        "1=1",
        "1\n+1",
        "٣+1",
        "(" * 101 + "1" + ")" * 98,
        "1+" * 100 + "1",
        "__import__('os')",
        "1<<9",
    ],
)
def test_other_text_is_no_arithmetic(text):
    assert gym.arithmetic(text) is None


def test_puzzle_needs_the_given_numbers_and_the_exact_target():
    entry = {"metadata": {"numbers": [3, 8, 3, 8], "target": 5}}
    assert gym.solves_puzzle("puzzle24", "8/(3-8/3)", entry)
    assert not gym.solves_puzzle("puzzle24", "6*4*1*1", entry)  # 24 of other numbers
    assert not gym.solves_puzzle("puzzle24", "3*8", entry)  # 24 of some of them
    assert not gym.solves_puzzle("puzzle24", "8*8/3+3", entry)  # 24.33
    assert not gym.solves_puzzle("countdown", "8/(3-8/3)", entry)
    assert gym.solves_puzzle("countdown", "8-3-3+8-5", {"metadata": {"numbers": [3, 3, 5, 8, 8], "target": 5}})


@pytest.fixture(scope="module")
def pool():
    with GradingPool(
        num_workers=1, timeout_seconds=30.0, functions=(math_grader.GRADER.worker, gym.GRADER.worker)
    ) as made:
        yield made


@pytest.mark.parametrize("dataset", ["countdown", "puzzle24", "basic_arithmetic", "number_sorting", "chain_sum"])
def test_own_answers_of_a_dataset_are_right_in_the_worker(pool, dataset):
    entries = reasoning_gym.create_dataset(dataset, seed=3, size=5)
    for index in range(5):
        metadata = {"task": dataset, "arguments": {}, "seed": 3, "size": 5, "index": index}
        graded = pool.submit("reasoning_gym", entries[index]["answer"], reference=None, metadata=metadata).result(60)
        assert graded.correct and graded.error is None


def test_too_much_credit_is_not_right(pool):
    """spell_backward's parts add up to 1.0000000000000002 for this answer, which only begins with the right one."""
    entries = reasoning_gym.create_dataset("spell_backward", seed=11, size=25)
    index = next(i for i in range(25) if entries.score_answer(entries[i]["answer"] + "x", entries[i]) > 1)
    metadata = {"task": "spell_backward", "arguments": {}, "seed": 11, "size": 25, "index": index}
    answer = entries[index]["answer"] + "x"
    assert not pool.submit("reasoning_gym", answer, reference=None, metadata=metadata).result(60).correct


@pytest.mark.parametrize(
    "dataset", sorted({*gym_tasks.REFUSED, *gym_tasks.ARITHMETIC, *gym_tasks.ANSWER_GRAMMARS} - {"composite"})
)
def test_code_in_an_answer_does_not_run(pool, dataset, tmp_path):
    made = tmp_path / "made"
    metadata = {"task": dataset, "arguments": {}, "seed": 3, "size": 5, "index": 0}
    for answer in (f"__import__('os').mkdir({str(made)!r})", f"[__import__('os').mkdir({str(made)!r})]"):
        verdict = pool.submit("reasoning_gym", answer, reference=None, metadata=metadata).result(60)
        assert not verdict.correct and not verdict.timed_out
        assert (verdict.error is not None) == (dataset in gym_tasks.REFUSED)
        assert not pool.submit("math", answer, reference="18").result(60).correct
    assert not made.exists()


def test_refused_task_is_a_fault_of_the_configuration():
    from megatron_r1.data.tasks import parse_task

    with pytest.raises(ConfigError, match="spiral_matrix cannot grade a model's answers, because its scorer runs"):
        parse_task("spiral_matrix:max_n=3")
    for dataset in gym_tasks.REFUSED:
        with pytest.raises(ConfigError, match="choose another dataset"):
            parse_task(dataset)
    assert parse_task("countdown").name == "countdown"
