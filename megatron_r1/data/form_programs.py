"""Programming problems as HumanEval, MBPP, LiveCodeBench and APPS write them: a prompt, and tests in our form.

What a publisher's harness puts around a program is kept: HumanEval's prompt stands before it, and helpers of the prompt
are the test's own; LiveCodeBench's hidden tests are unpacked. Files are not trusted: a pickle may only hold a text.
Left out: running (rewards/code.py says what tests must look like).
"""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.syntax import parse

MAX_UNPACKED_BYTES = 256 << 20
ONE_BLOCK = "Answer with the whole program, imports included, in one ```python block."


def humaneval(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`test` defines check(candidate). The prompt's helpers, which tests call too, come with the test: the program
    cannot then replace them."""
    prompt, test, entry_point = (_text(row, key, where) for key in ("prompt", "test", "entry_point"))
    question = f"Complete this Python program.\n\n```python\n{prompt.rstrip()}\n```\n\n{ONE_BLOCK}"
    asserts = "\n\n".join([_helpers(prompt, entry_point), test])
    return {
        "question": question,
        "grader": "code",
        "tests": {"asserts": [asserts], "entry_point": entry_point, "prefix": prompt.rstrip() + "\n"},
    }


def mbpp(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One of the tests is shown, as its authors do, since only it tells the function's name."""
    task = _text(row, "text" if row.get("text") else "prompt", where)
    tests = _texts(row, "test_list", where)
    more = _texts(row, "challenge_test_list", where) if row.get("challenge_test_list") else []
    setup = "\n".join([*(_texts(row, "test_imports", where) if row.get("test_imports") else []), _setup(row)]).strip()
    entry_point = _entry_point(tests, str(row.get("code") or ""), where)
    shown = "\n".join(tests)
    return {
        "question": f"{task.strip()}\n\nThe program must pass these tests:\n\n```python\n{shown}\n```\n\n{ONE_BLOCK}",
        "grader": "code",
        "tests": {"asserts": [f"{setup}\n{test}".strip() for test in (*tests, *more)], "entry_point": entry_point},
    }


def livecodebench(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Public and private tests, of a function (metadata has its name) or of input and output."""
    cases = _cases(row, "public_test_cases", where)
    if row.get("private_test_cases"):
        cases += _cases(row, "private_test_cases", where)
    starter = str(row.get("starter_code") or "").rstrip()
    title = str(row.get("question_title") or "").strip()
    parts = [part for part in (title, _text(row, "question_content", where).strip()) if part]
    name = _function_name(row, where)
    if name:
        parts += [f"Complete this program:\n\n```python\n{starter}\n```"] if starter else [f"Write {name}."]
        tests = _calls(cases, name, starter, where)
    else:
        parts += ["The program reads standard input and writes standard output."]
        tests = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
    return {"question": "\n\n".join([*parts, ONE_BLOCK]), "grader": "code", "tests": tests}


def standard_streams(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """APPS: input_output is JSON with inputs, outputs and perhaps fn_name."""
    given = row["input_output"]
    fields = _json(given, "input_output", where) if isinstance(given, str) else given
    if not isinstance(fields, dict) or not isinstance(fields.get("inputs"), list) or "outputs" not in fields:
        raise DataError(f"{where}: input_output must hold inputs and outputs")
    inputs, outputs = fields["inputs"], fields["outputs"]
    starter = str(row.get("starter_code") or "").rstrip()
    parts = [_text(row, "question", where).strip()]
    if name := fields.get("fn_name"):
        pairs = [(list(given), wanted) for given, wanted in zip(inputs, outputs, strict=False)]
        tests = {"asserts": [_call(*pair) for pair in pairs], "entry_point": _method(str(name), starter)}
        parts += [f"Complete this program:\n\n```python\n{starter}\n```"] if starter else [f"Write {name}."]
    else:
        tests = {"inputs": [_stream(text) for text in inputs], "outputs": [_stream(text) for text in outputs]}
        parts += ["The program reads standard input and writes standard output."]
    return {"question": "\n\n".join([*parts, ONE_BLOCK]), "grader": "code", "tests": tests}


def _helpers(prompt: str, entry_point: str) -> str:
    """What a prompt defines beside the function that is asked for."""
    try:
        tree = parse(prompt)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    tree.body = [node for node in tree.body if getattr(node, "name", None) != entry_point]
    return ast.unparse(tree)


def _entry_point(tests: Sequence[str], code: str, where: str) -> str:
    """The function that all tests call; of several that which the reference solution defines last."""
    try:
        body = parse(code).body
    except (SyntaxError, ValueError, RecursionError):
        body = []
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    called: list[set[str]] = []
    for test in tests:
        try:
            tree = parse(test)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: the test {test!r:.80} is not Python ({error})") from error
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        called.append({name for name in calls if name in defined or not hasattr(builtins, name)})
    common = set.intersection(*called) if called else set()
    names = [name for name in defined if name in common] or sorted(common)
    if not names:
        raise DataError(f"{where}: the tests call no function in common; expected one that the program defines")
    return names[-1]


def _setup(row: Mapping[str, Any]) -> str:
    return str(row.get("test_setup_code") or "").replace("\r\n", "\n")


def _cases(row: Mapping[str, Any], key: str, where: str) -> list[dict[str, str]]:
    given = row[key]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:  # also RecursionError's kin: what is no JSON is packed
            given = _json(_unpacked(given, key, where), key, where)
    if not isinstance(given, list) or not all(
        isinstance(case, dict) and isinstance(case.get("input"), str) and isinstance(case.get("output"), str)
        for case in given
    ):
        raise DataError(f"{where}: {key} must be a list of objects with input and output")
    return given


class _TextUnpickler(pickle.Unpickler):
    """Takes plain data only: no class or function is ever looked up."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is asked for")


def _unpacked(packed: str, key: str, where: str) -> str:
    """The text in base64 of zlib of a pickle, as LiveCodeBench packs its hidden tests."""
    try:
        engine = zlib.decompressobj()
        content = engine.decompress(base64.b64decode(packed, validate=True), MAX_UNPACKED_BYTES)
        if engine.unconsumed_tail:
            raise DataError(f"{where}: {key} unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        text = _TextUnpickler(io.BytesIO(content)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: {key} is neither JSON nor packed JSON ({error})") from error
    if not isinstance(text, str):
        raise DataError(f"{where}: {key} is packed and holds a {type(text).__name__}; expected a text")
    return text


def _function_name(row: Mapping[str, Any], where: str) -> str:
    metadata = row.get("metadata")
    fields = _json(metadata, "metadata", where) if isinstance(metadata, str) and metadata.strip() else metadata
    return str(fields.get("func_name") or "") if isinstance(fields, dict) else ""


def _calls(cases: Sequence[Mapping[str, str]], name: str, starter: str, where: str) -> dict[str, Any]:
    asserts = []
    for case in cases:
        arguments = [_json(line, "a test's input", where) for line in case["input"].split("\n") if line.strip()]
        asserts.append(_call(arguments, _json(case["output"], "a test's output", where)))
    return {"asserts": asserts, "entry_point": _method(name, starter)}


def _method(name: str, starter: str) -> str:
    """The entry point: functions stand in a class, except where the starter code has none."""
    return name if starter and "class Solution" not in starter else f"Solution().{name}"


def _call(arguments: list[Any], wanted: Any) -> str:
    """One call and its result, where tuples count as lists, as in the publishers' harness."""
    given = ", ".join(map(repr, arguments))
    return f"found = candidate({given})\nassert (list(found) if isinstance(found, tuple) else found) == {wanted!r}"


def _stream(text: Any) -> str:
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)


def _json(text: str, key: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {key} is not valid JSON: {error}") from error


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} is {value!r:.80}; expected non-empty text")
    return value


def _texts(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = row[key]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: {key} is {value!r:.80}; expected a list of texts")
    return value
