"""Which part of an answer is the program, in the forms that models write."""

import time

import pytest

from megatron_r1.rewards.code_extract import extract_program

LIST = "1. Read.\n   ```python\n   def f():\n       return 1\n   ```\n2. Done."
DOCSTRING = 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1\n'


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("print(1)", "print(1)"),
        ("First\n```python\na = 1\n```\nthen\n```python\na = 2\n```\nDone.", "a = 2\n"),
        ("```py\nx\n```\n```\nnot this\n```", "x\n"),
        ("```Python3\r\nx\r\n```", "x\r\n"),
        ("  ```python\n  x\n  ```", "x\n"),
        ("```python\na\n```\n```python\ncut short", "a\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        # no language, or another word for Python
        ("```\nx\n```", "x\n"),
        ("The code:\n```\nx\n```\nprints 3.", "x\n"),
        ("``` python \nx\n```", "x\n"),
        ("```python3.11\nx\n```", "x\n"),
        ("```PY3\nx\n```", "x\n"),
        ("```ipython\nx\n```", "x\n"),
        ("```{.python}\nx\n```", "x\n"),
        ("```{.python .numberLines}\nx\n```", "x\n"),
        ("```{python}\nx\n```", "x\n"),
        ("```python title=x\nx\n```", "x\n"),
        ('```python title="a b.py" linenums="1"\nx\n```', "x\n"),
        ("```python:main.py\nx\n```", "x\n"),
        ("```python,linenos\nx\n```", "x\n"),
        # other fences
        ("~~~\nx\n~~~", "x\n"),
        ("~~~python\n```\nx\n~~~", "```\nx\n"),
        ("````python\n```\nx\n````", "```\nx\n"),
        ("```python\nx\n````", "x\n"),
        ("```print(1)```", "print(1)"),
        ("```python print(1)```", "print(1)"),
        # without an end
        ("```python\nx", "x"),
        ("```\nx = 1\n", "x = 1\n"),
        ("Text\n```python\ndef f(): return 1```\nwords", "def f(): return 1"),
        ("```python", ""),
        ("```python\n```", ""),
        # indented, in lists and quotations
        (LIST, "def f():\n    return 1\n"),
        ("- ```python\n  def f():\n      return 1\n  ```", "def f():\n    return 1\n"),
        ("* Code:\n\n\t```python\n\tx\n\t```", "x\n"),
        ("> ```python\n> def f():\n>     return 1\n> ```", "def f():\n    return 1\n"),
        ("   ```python\n   s = '''\na'''\n   ```", "s = '''\na'''\n"),
        # which of several
        ("```\nf(1)\n```\n```python\nx\n```\n```\n3\n```", "x\n"),
        ("```\nx\n```\n```text\n3\n```", "x\n"),
        ("```\noutput\n```\n```python\ncut", "cut"),
        ("```cpp\nint x;\n```\n```js\nlet x\n```", "let x\n"),
        ("```python-repl\n>>> x\n```\n```\ny\n```", "y\n"),
        # fences inside the program
        (f"```python\n{DOCSTRING}```\nBye", DOCSTRING),
        ("```python\ns = '''\n```\nIt ends there.", "s = '''\n"),
        ("\ufeff```python\nx\n```", "x\n"),
        ("\ufeffx", "x"),
        ("", ""),
    ],
)
def test_the_program_is_found(answer, program):
    assert extract_program(answer) == program


@pytest.mark.parametrize(
    "answer",
    [
        "```\n" * 50_000,
        "'''\n" * 50_000 + "```\n",
        '```python\n"""\n```\n' * 10_000,
        "`" * 200_000,
        "> " * 100_000 + "```",
        '```python\n"""' + "\\" * 100_000,
        "```python\n" + "\n".join(" " * i for i in range(500)),
    ],
)
def test_long_answers_take_no_time(answer):
    began = time.process_time()
    extract_program(answer)
    assert time.process_time() - began < 2
