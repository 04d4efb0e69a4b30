"""The tests of a coding problem as they are run: forms are recognised, and what cannot fail is refused.

Publishers write assertions, HumanEval's check(candidate), pytest's test functions and unittest's classes. Each becomes
statements in which `candidate` stands for the entry point and which call what has to be called. A test that no program
could fail would reward every program, so it is a DataError with its reason (code_proof.py). Left out: running them.
"""

from __future__ import annotations

import ast
import builtins
import math
import symtable
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.rewards.code_proof import why_it_proves_nothing
from megatron_r1.syntax import parse

CANDIDATE = "candidate"
SHOWN = 200
"""Characters of a test in an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`statements` call `candidate`. `names` are the program's that they use beside it, `exceptions` those that stand
    for its exception classes; `objects`: one of its classes is used by name, so that its objects may be asked."""

    statements: str
    names: tuple[str, ...] = ()
    exceptions: tuple[str, ...] = ()
    objects: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTests:
    """The tests of one problem: `cases` of (input, expected output), or `checks` with their entry point."""

    cases: tuple[tuple[str, str], ...] = ()
    tolerance: float | None = None
    checks: tuple[Check, ...] = ()
    entry_point: str = ""
    prefix: str = ""
    """Stands before every program, as HumanEval's prompt does."""


def parse_tests(tests: Mapping[str, Any]) -> CodeTests:
    """Reads {"inputs": [...], "outputs": [...], "tolerance": 1e-6} or {"asserts": [...], "entry_point": "f", "prefix":
    "import math"}; tolerance and prefix may be left out.

    DataError, with the reason, for anything else and for tests that every program would pass.
    """
    keys = set(tests)
    if keys in ({"inputs", "outputs"}, {"inputs", "outputs", "tolerance"}):
        return _cases(tests)
    if keys in ({"asserts", "entry_point"}, {"asserts", "entry_point", "prefix"}):
        prefix = tests.get("prefix", "")
        if not isinstance(prefix, str):
            raise DataError(f"code tests: prefix {prefix!r:.80}; expected the text of a program")
        entry_point = tests["entry_point"]
        try:
            wanted = ast.dump(parse(entry_point, mode="eval").body)
        except (SyntaxError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"code tests: entry_point {entry_point!r} is not an expression ({error})") from error
        checks = tuple(_check(text, wanted, entry_point) for text in _texts(tests, "asserts"))
        return CodeTests(checks=checks, entry_point=entry_point, prefix=prefix)
    raise DataError(
        f"code tests: keys {sorted(keys)}; expected inputs and outputs (and tolerance), or asserts and entry_point "
        "(and prefix)"
    )


def _cases(tests: Mapping[str, Any]) -> CodeTests:
    inputs, outputs = _texts(tests, "inputs"), _texts(tests, "outputs")
    if len(inputs) != len(outputs):
        raise DataError(f"code tests: {len(inputs)} inputs and {len(outputs)} outputs; expected as many of each")
    tolerance = tests.get("tolerance")
    if tolerance is not None and not (type(tolerance) in (int, float) and 0 <= tolerance < math.inf):
        raise DataError(f"code tests: tolerance {tolerance!r}; expected a number from 0, or null")
    if not any(output.strip() for output in outputs):
        raise DataError("code tests: every expected output is empty, so a program that prints nothing passes")
    return CodeTests(cases=tuple(zip(inputs, outputs)), tolerance=tolerance)


def _texts(tests: Mapping[str, Any], key: str) -> Sequence[str]:
    value = tests[key]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"code tests: {key} must be a list of at least one string")
    return value


def _check(text: str, wanted: str, entry_point: str) -> Check:
    """One test, ready to be run."""
    shown = repr(text.strip()[:SHOWN])
    try:
        tree = parse(text)
        tree.body = [node for node in tree.body if not _is_of_the_program(node)]
        own = {getattr(node, "name", "") for node in tree.body}
        tree.body = [node for node in tree.body if not (_is_main(node) and "main" not in own)]
        tree.body += _runners(tree, shown)
        stand_in = _StandIn(wanted)
        stand_in.visit(tree)
        ast.fix_missing_locations(tree)
        root = next((n.id for n in ast.walk(parse(entry_point)) if isinstance(n, ast.Name)), "")
        loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        called = CANDIDATE if stand_in.found else root  # s = Solution(), then s.f(1)
        if called not in loaded:
            raise DataError(f"code tests: {shown} never calls {entry_point}, so any program would pass it")
        if (reason := why_it_proves_nothing(tree, called)) is not None:
            raise DataError(f"code tests: {shown} {reason}, so any program would pass it; write `assert` statements")
        _InPlace().visit(tree)
        statements = ast.unparse(ast.fix_missing_locations(tree))
        names, exceptions = _names_of_the_program(tree, statements)
        modules = _modules(tree, names)
        statements = "".join(f"import {name}\n" for name in modules) + statements
        names = [name for name in names if name not in modules]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"code tests: {shown} is not Python ({error})") from error
    foreign = sorted(_imported(tree) - set(sys.stdlib_module_names))
    if foreign:
        raise DataError(
            f"code tests: {shown} imports {', '.join(foreign)}; the sandbox has the standard library only, so no "
            "program could pass: rewrite the test without it, or leave the problem out"
        )
    is_class = entry_point.isidentifier() and entry_point[:1].isupper()
    return Check(
        statements=statements,
        names=tuple(names),
        exceptions=tuple(exceptions),
        objects=is_class or any(name[:1].isupper() for name in names),
    )


class _StandIn(ast.NodeTransformer):
    """Puts the name `candidate` in the place of one expression."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.found = False

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Name) and node.id == CANDIDATE:
            self.found = True
        if isinstance(node, ast.expr) and ast.dump(node) == self.wanted:
            self.found = True
            return ast.Name(id=CANDIDATE, ctx=ast.Load())
        return self.generic_visit(node)


class _InPlace(ast.NodeTransformer):
    """A call whose result is dropped can only matter by what it does to its arguments: it brings that home."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Call):
            function = ast.Name(id="r1_in_place", ctx=ast.Load())
            node.value.func = ast.Call(func=function, args=[node.value.func], keywords=[])
        return node


def _is_of_the_program(node: ast.stmt) -> bool:
    """`from solution import f`, as it stands above many tests: the names are the program's anyway."""
    return isinstance(node, ast.ImportFrom) and node.module in ("solution", "__main__", "main")


def _is_main(node: ast.stmt) -> bool:
    """`unittest.main()`: it looks for tests in files."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and _dotted(node.value.func)
        in (
            "unittest.main",
            "main",
        )
    )


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _runners(tree: ast.Module, shown: str) -> list[ast.stmt]:
    """Calls of what the text only defines: check(candidate), test functions and classes of tests."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    lines: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name not in used:
            needed = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
            if node.name == "check" and needed == 1:
                lines.append(f"check({CANDIDATE})")
            elif node.name.startswith("test") and needed:
                raise DataError(f"code tests: {shown} {node.name} takes arguments, which only pytest could give")
            elif node.name.startswith("test") or (node.name == "check" and not needed):
                lines.append(f"{node.name}()")
        if isinstance(node, ast.ClassDef) and node.name not in used:
            lines += _class_runner(node, tree)
    return parse("\n".join(lines)).body


def _class_runner(node: ast.ClassDef, tree: ast.Module) -> Iterator[str]:
    classes = {item.name: item for item in tree.body if isinstance(item, ast.ClassDef)}
    bases = [_dotted(base) for base in node.bases]
    while bases and not any(base.endswith("TestCase") for base in bases):
        bases = [_dotted(base) for name in bases if name in classes for base in classes[name].bases]
    if bases:
        yield f"__import__('unittest').defaultTestLoader.loadTestsFromTestCase({node.name}).debug()"
        return
    methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
    for method in methods if node.name.startswith("Test") else ():
        if method.startswith("test"):
            yield f"r1_case = {node.name}()"
            yield from ("r1_case.setup_method()" for name in methods if name == "setup_method")
            yield f"r1_case.{method}()"


def _names_of_the_program(tree: ast.Module, statements: str) -> tuple[list[str], list[str]]:
    """Names that the test uses and does not define, and those of them that stand for exceptions."""
    top = symtable.symtable(statements, "test.py", "exec")
    defined = {symbol.get_name() for symbol in top.get_symbols() if not _is_free(symbol)}
    used: set[str] = set()
    waiting = [top]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        for symbol in table.get_symbols():
            if table is not top and symbol.is_global() and symbol.is_assigned():
                defined.add(symbol.get_name())
            elif symbol.is_referenced() and (table is top or symbol.is_global()):
                used.add(symbol.get_name())
    free = used - defined - set(dir(builtins)) - {CANDIDATE, "r1_in_place", "exit", "quit"}
    free -= {name for name in free if name.startswith("__") and name.endswith("__")}
    caught: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            caught |= {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
        if isinstance(node, ast.Call) and _dotted(node.func).rpartition(".")[2] in EXPECT_EXCEPTIONS and node.args:
            caught |= {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
    return sorted(free - caught), sorted(free & caught)


def _modules(tree: ast.Module, names: Sequence[str]) -> list[str]:
    """Modules that a test uses because the reference solution imports them: the test gets its own."""
    bases = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    alone = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in bases}
    return [name for name in names if name in COMMON_MODULES and name not in alone]


COMMON_MODULES = (
    *("cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "json"),
    *("math", "operator", "os", "random", "re", "statistics", "string", "sys", "time"),
)
EXPECT_EXCEPTIONS = ("assertRaises", "assertRaisesRegex", "raises", "suppress")


def _is_free(symbol: symtable.Symbol) -> bool:
    return not (symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace())


def _imported(tree: ast.Module) -> set[str]:
    """The modules that the text needs: those that a `try` may do without are not counted."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif not isinstance(node, ast.Try):
            waiting += ast.iter_child_nodes(node)
    return found - {""}
