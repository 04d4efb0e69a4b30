r"""\boxed{} is found as TeX would: braces nest, escaped ones do not count, what is never closed is none."""

import time

import pytest

from megatron_r1.boxed import boxed_contents, boxed_spans, final_boxes


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("", []),
        ("18", []),
        (r"\boxed{18}", ["18"]),
        (r"so $\boxed{\frac{1}{2}}$.", [r"\frac{1}{2}"]),
        (r"\boxed{3}, \boxed{5}", ["3", "5"]),
        (r"\boxed{\boxed{2}}", [r"\boxed{2}"]),
        (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
        (r"\fbox{7}", ["7"]),
        (r"\boxed {7}", ["7"]),
        (r"\boxed 7 apples", ["7"]),
        (r"\boxed\pi", [r"\pi"]),
        (r"\boxed{18", []),
        (r"\boxed{4 and \boxed{5}", ["5"]),
        (r"\boxed", []),
        (r"\boxed{}", [""]),
        (r"\unboxed{4}", []),
        ("\\boxed{a\nb}", ["a\nb"]),
    ],
)
def test_contents_are_the_outermost_complete_boxes(text, contents):
    assert boxed_contents(text) == contents


def test_spans_cover_the_whole_command():
    text = r"a \boxed{x} b \boxed 2 c"
    assert [text[start:end] for start, end, _ in boxed_spans(text)] == [r"\boxed{x}", r"\boxed 2"]


def test_many_unclosed_boxes_take_no_time():
    begun = time.process_time()
    assert boxed_contents(r"\boxed{" * 20_000) == []
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("18", None),
        (r"First \boxed{1}. Then \boxed{2}.", "2"),
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "1, 2"),
        (r"\boxed{1}, \boxed{2}, \boxed{3}", "1, 2, 3"),
        (r"\boxed{18} \boxed{}", "18"),
        (r"\boxed\frac12", r"\frac12"),
    ],
)
def test_boxes_with_only_separators_between_them_are_one_answer(text, final):
    assert final_boxes(text) == final
