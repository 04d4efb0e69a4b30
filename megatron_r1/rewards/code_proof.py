"""Why a test proves nothing: it has no assertion, none that runs, or none that can fail.

Read from the syntax, so it costs nothing when problems are loaded, and finds only what is plain to see. The proof is
to run the tests against programs that do nothing: megatron-r1 check-data does that. When in doubt a test is kept.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence

SWALLOW = ("", "Exception", "BaseException", "AssertionError")
FAILING_CALLS = ("exit", "_exit", "quit", "abort")
TRUE_OF_ALL = ("callable", "hasattr")


def why_it_proves_nothing(tree: ast.Module, candidate: str) -> str | None:
    """The reason in words, to stand behind the test's text; None where an assertion may fail."""
    everything = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    if not any(_can_fail(node, None) for node in everything):
        return "has no assertion"
    live = list(_live(tree.body, tree, set()))
    if not any(_can_fail(node, None) for node, _ in live):
        return "has no assertion that runs (under a condition that is false, or in what nothing calls)"
    if not any(_can_fail(node, None) for node, swallowed in live if not swallowed):
        return "catches its own failed assertions"
    if not any(_can_fail(node, candidate) for node, swallowed in live if not swallowed):
        return "has no assertion that can fail"
    if not any(_calls(node, candidate) for node, _ in live):
        return "never calls the entry point in what runs"
    return None


def _live(body: Iterable[ast.stmt], tree: ast.Module, seen: set[str], swallowed: bool = False) -> Iterator:
    """(statement, whether a failure in it is caught) of what is run, as far as the syntax tells; functions and classes
    when their names are first used, or where a decorator may call them."""
    for node in body:
        if isinstance(node, DEFINITIONS):
            if node.decorator_list:
                yield node, swallowed
                yield from _bodies([node], tree, seen, swallowed)
            continue
        yield node, swallowed
        used = {name.id for name in ast.walk(_head(node)) if isinstance(name, ast.Name)} - seen
        used |= {name.attr for name in ast.walk(_head(node)) if isinstance(name, ast.Attribute)} - seen
        seen |= used
        defined = [item for item in ast.walk(tree) if isinstance(item, DEFINITIONS) and item.name in used]
        yield from _bodies(defined, tree, seen, swallowed)
        if isinstance(node, ast.If | ast.While):
            truth = _truth(node.test)
            yield from _live(node.body if truth is not False else [], tree, seen, swallowed)
            yield from _live(node.orelse if truth is not True else [], tree, seen, swallowed)
        elif isinstance(node, ast.Try):
            caught = any(_swallows(handler) for handler in node.handlers)
            yield from _live(node.body, tree, seen, swallowed or caught)
            for handler in node.handlers:
                yield from _live(handler.body, tree, seen, swallowed)
            yield from _live(node.orelse, tree, seen, swallowed or caught)  # not reached by a program that raises
            yield from _live(node.finalbody, tree, seen, swallowed)
        elif isinstance(node, ast.With | ast.AsyncWith):
            caught = any(_suppresses(item.context_expr) for item in node.items)
            yield from _live(node.body, tree, seen, swallowed or caught)
        elif isinstance(node, ast.For | ast.AsyncFor):
            empty = isinstance(node.iter, ast.List | ast.Tuple) and not node.iter.elts
            yield from _live([] if empty else [*node.body, *node.orelse], tree, seen, swallowed)
        elif isinstance(node, ast.Match):
            for case in node.cases:
                yield from _live(case.body, tree, seen, swallowed)
        if isinstance(node, ast.Return | ast.Raise | ast.Continue | ast.Break):
            return


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _bodies(definitions: Iterable[ast.AST], tree: ast.Module, seen: set[str], swallowed: bool) -> Iterator:
    """What runs if functions are called, and classes made and all their methods called."""
    for item in definitions:
        if isinstance(item, ast.ClassDef):
            yield from _live([part for part in item.body if not isinstance(part, DEFINITIONS)], tree, seen, swallowed)
            yield from _bodies([part for part in item.body if isinstance(part, DEFINITIONS)], tree, seen, swallowed)
        elif isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _live(item.body, tree, seen, swallowed)


def _head(node: ast.stmt) -> ast.AST:
    """What a compound statement evaluates itself, without its body."""
    parts = [
        value
        for name, value in ast.iter_fields(node)
        if name not in ("body", "orelse", "finalbody", "handlers", "cases")
    ]
    flat: list[ast.AST] = []
    for part in parts:
        flat += part if isinstance(part, list) else [part] if isinstance(part, ast.AST) else []
    return ast.Tuple(elts=[item for item in flat if isinstance(item, ast.AST)], ctx=ast.Load())  # type: ignore[misc]


def _truth(test: ast.expr) -> bool | None:
    """What is known of a condition: the module is not run as __main__, and no type checker runs it."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING":
        return False
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.NotEq):
        sides = [test.left, test.comparators[0]]
        is_name = any(isinstance(side, ast.Name) and side.id == "__name__" for side in sides)
        is_main = any(isinstance(side, ast.Constant) and side.value == "__main__" for side in sides)
        if is_name and is_main:
            return isinstance(test.ops[0], ast.NotEq)
    return None


def _swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a failed assertion ends in this handler."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {"" if kind is None else getattr(kind, "id", getattr(kind, "attr", "?")) for kind in kinds}
    return bool(names & set(SWALLOW)) and not any(_can_fail(node, None) for node in _statements(handler.body))


def _suppresses(context: ast.expr) -> bool:
    if (
        not isinstance(context, ast.Call)
        or getattr(context.func, "attr", getattr(context.func, "id", "")) != "suppress"
    ):
        return False
    return any(getattr(kind, "id", "") in SWALLOW for kind in context.args)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield from (inner for inner in ast.walk(node) if isinstance(inner, ast.stmt))


def _can_fail(node: ast.stmt, candidate: str | None) -> bool:
    """Whether a statement itself can make the test fail; with `candidate`, whether its condition can be false."""
    if isinstance(node, ast.Assert):
        return candidate is None or not _always_true(node.test, candidate)
    if isinstance(node, ast.Raise):
        return True
    calls = [call for call in ast.walk(_head(node)) if isinstance(call, ast.Call)]
    return any(_is_failing(call) for call in calls)


def _is_failing(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name in FAILING_CALLS or name.startswith(("assert", "fail"))


def _calls(node: ast.stmt, candidate: str) -> bool:
    """Whether the entry point is called, or handed to what may call it."""
    for found in ast.walk(_head(node)):
        if isinstance(found, ast.Name) and found.id == candidate and isinstance(found.ctx, ast.Load):
            return True
    return False


def _always_true(test: ast.expr, candidate: str) -> bool:
    """Whether a condition holds whatever the program does."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.Tuple | ast.List | ast.Set):
        return bool(test.elts)
    if isinstance(test, ast.Lambda):
        return True
    if isinstance(test, ast.Name):
        return test.id == candidate
    if isinstance(test, ast.Call):
        return (
            getattr(test.func, "id", "") in TRUE_OF_ALL and _always_true(test.args[0], candidate)
            if test.args
            else False
        )
    if isinstance(test, ast.BoolOp):
        parts = [_always_true(value, candidate) for value in test.values]
        return any(parts) if isinstance(test.op, ast.Or) else all(parts)
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return _comparison_holds(test.left, test.ops[0], test.comparators[0], candidate)
    return False


def _comparison_holds(left: ast.expr, operator: ast.cmpop, right: ast.expr, candidate: str) -> bool:
    if isinstance(operator, ast.IsNot | ast.NotEq):  # f is not None
        sides = [left, right]
        named = any(isinstance(side, ast.Name) and side.id == candidate for side in sides)
        return named and any(isinstance(side, ast.Constant) for side in sides)
    if isinstance(operator, ast.Eq | ast.Is | ast.LtE | ast.GtE) and ast.dump(left) == ast.dump(right):
        return True
    is_length = isinstance(left, ast.Call) and getattr(left.func, "id", "") == "len"
    return is_length and isinstance(operator, ast.GtE) and isinstance(right, ast.Constant) and right.value == 0
