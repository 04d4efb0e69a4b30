"""Selection on hand-made samples: every reason, their order, and what the report counts."""

from pathlib import Path

import pytest

from megatron_r1.config.judge import JudgeConfig
from megatron_r1.data.decontaminate import EvaluationIndex
from megatron_r1.data.dedup import SeenTexts
from megatron_r1.rewards.judge import Judgement
from megatron_r1.stages.rejection.config import DedupConfig, FilterConfig, RejectionConfig
from megatron_r1.stages.rejection.select import REASONS, Sample, first_reason, may_be_judged, select
from megatron_r1.stages.rejection.yields import Yield, describe_yield
from megatron_r1.types import Problem

NO_INDEX = EvaluationIndex(size=5, owner={}, file_of={})


def config(**fields):
    given = {"keep_per_problem": 2, "filters": FilterConfig(max_paragraph_characters=200)} | fields
    return RejectionConfig(run_dir=Path("run"), model=Path("model"), **given)


def problem(name="p", domain="sums", **fields):
    given = {"answer": "7", "grader": "math"} | fields
    return Problem(id=name, domain=domain, messages=({"role": "user", "content": f"{name}?"},), **given)


def sample(thought, number=0, *, of=None, answer="7", right=True, finish_reason="stop", language=1.0):
    return Sample(
        problem=of or problem(),
        number=number,
        text=f"<think>{thought}</think><answer>{answer}</answer>",
        finish_reason=finish_reason,
        num_tokens=9,
        parts={"accuracy": float(right), "format": 1.0, "language": language},
    )


def decide(samples, settings=None, *, index=NO_INDEX, judgements=None, seen=None):
    settings = settings or config()
    reasons = [first_reason(one, settings) for one in samples]
    seen = seen or SeenTexts(settings.dedup)
    decisions = select(samples, reasons, config=settings, seen=seen, index=index, judgements=judgements or {})
    return [decision.reason for decision in decisions]


def test_every_sample_has_one_reason_or_is_kept():
    long, code = "We add. " * 40, "We run it.\n```\n3 + 4\n```"
    loop = "\n".join(["We add three and four."] * 9)
    index = EvaluationIndex(size=5, owner={"this was in the exam": "exam:1"}, file_of={"exam:1": "exam.jsonl"})
    samples = [
        sample("We add", finish_reason="length"),
        Sample(problem=problem(), number=1, text="7", finish_reason="stop", num_tokens=1, parts={"accuracy": 0.0}),
        sample("We take away.", right=False),
        sample("Wir zählen die Zahlen zusammen.", language=0.0),
        sample(long),
        sample(code),
        sample(loop),
        sample("Surely this was in the exam."),
        sample("We add."),
        sample("we add"),
        sample("We put them together."),
        sample("We count on."),
    ]
    assert decide(samples, config(filters=FilterConfig(max_paragraph_characters=250)), index=index) == [
        "truncated", "missing_tags", "incorrect", "mixed_language", "long_paragraph", "code_block", "repetition",
        "contaminated", None, "duplicate", None, "over_limit",
    ]  # fmt: skip


def test_reasons_are_looked_for_in_the_order_of_the_table():
    """A sample that breaks several rules counts under the first of them."""
    bad = sample("我们。" * 100 + "```x```", right=False, finish_reason="length", language=0.0)
    assert first_reason(bad, config()) == "truncated"
    names = list(REASONS)
    assert names.index("incorrect") < names.index("mixed_language") < names.index("judged_incorrect")
    assert names[-3:] == ["over_limit", "duplicate", "near_duplicate"]


def test_at_most_k_different_samples_of_each_problem():
    one, other = problem("one"), problem("other")
    samples = [sample(f"We think of it as {n}.", n, of=p) for p in (one, other) for n in range(4)]
    assert decide(samples) == [None, None, "over_limit", "over_limit"] * 2
    assert decide(samples, config(keep_per_problem=1)) == [None, *["over_limit"] * 3] * 2


def test_near_duplicates_count_over_all_problems_and_calls():
    settings = config(dedup=DedupConfig(threshold=0.8, ngram=2, min_words=30), filters=FilterConfig())
    words = [f"word{n}" for n in range(60)]
    seen = SeenTexts(settings.dedup)
    first = sample(" ".join(words), of=problem("one"))
    almost = sample(" ".join([*words, "then", "stop"]), of=problem("other"))
    assert decide([first], settings, seen=seen) == [None]
    assert decide([almost], settings, seen=seen) == ["near_duplicate"]


def test_a_sample_that_is_not_kept_does_not_shadow_others():
    """The third is over the limit of its problem; the fourth says the same of another problem and is kept."""
    text = " ".join(f"step{n}" for n in range(60))
    samples = [sample("We add."), sample("We count.", 1), sample(text, 2), sample(text, of=problem("other"))]
    assert decide(samples, config(filters=FilterConfig())) == [None, None, "over_limit", None]


def judge(**fields):
    return JudgeConfig(url="http://h/v1", model="m", **fields)


@pytest.mark.parametrize(
    ("of", "answer", "domains", "expected"),
    [
        (problem(), "seven", (), True),
        (problem(grader="exact"), "seven", ("sums",), True),
        (problem(), "seven", ("law",), False),
        (problem(), " ", (), False),  # nothing to judge
        (problem(grader="code", answer=None), "print(7)", (), False),
        (problem(grader="reasoning_gym"), "seven", (), False),
    ],
)
def test_what_a_judge_may_be_asked(of, answer, domains, expected):
    wrong = sample("We add.", of=of, answer=answer, right=False)
    assert may_be_judged(wrong, config(judge=judge(domains=domains))) is expected
    assert first_reason(wrong, config(judge=judge(domains=domains))) == (None if expected else "incorrect")
    assert not may_be_judged(wrong, config())


def test_the_judge_decides_where_the_rule_found_nothing():
    settings = config(judge=judge(), keep_per_problem=9)
    samples = [sample(f"We add {n}.", n, answer="seven", right=n == 0) for n in range(4)]
    judgements = {
        ("p", 1): Judgement(value=True),
        ("p", 2): Judgement(value=False),
        ("p", 3): Judgement(value=None, failure="timeout"),
    }
    reasons = [first_reason(one, settings) for one in samples]
    assert reasons == [None] * 4
    decisions = select(
        samples, reasons, config=settings, seen=SeenTexts(settings.dedup), index=NO_INDEX, judgements=judgements
    )
    assert [one.reason for one in decisions] == [None, None, "judged_incorrect", "judge_failed"]
    assert [one.correct_by for one in decisions] == ["rule", "judge", None, None]


def test_the_report_counts_every_sample_once():
    settings = config(keep_per_problem=1)
    total = Yield()
    for name, domain in (("a", "sums"), ("b", "sums"), ("c", "logic")):
        samples = [sample("We add.", 0, of=problem(name, domain), right=name != "b"), sample("No.", 1, right=False)]
        samples = [Sample(**{f: getattr(s, f) for f in s.__slots__} | {"problem": samples[0].problem}) for s in samples]
        reasons = [first_reason(one, settings) for one in samples]
        seen = SeenTexts(settings.dedup)
        total.add(select(samples, reasons, config=settings, seen=seen, index=NO_INDEX, judgements={}))
    report = total.as_json()
    assert total.kept == 2
    assert report["all"] == {
        "problems": 3, "problems_kept": 2, "samples": 6, "kept": 2, "dropped": {"incorrect": 4},
    }  # fmt: skip
    assert report["by_domain"]["sums"] == {
        "problems": 2, "problems_kept": 1, "samples": 4, "kept": 1, "dropped": {"incorrect": 3},
    }  # fmt: skip
    for counts in (report["all"], *report["by_domain"].values()):
        assert counts["kept"] + sum(counts["dropped"].values()) == counts["samples"]
    text = describe_yield(
        {
            "problems": {"given": 5, "contaminated": 1, "repeated": 1, "no_room": 0, "sampled": 3},
            "yield": report,
            "contamination": {"exam.jsonl": {"problems": 1, "evaluation_problems": 1, "examples": {"x": "y"}}},
            "mix": [{"file": "talk.jsonl", "written": 1, "wanted": 4}],
        }
    )
    assert text.splitlines() == [
        "problems: 5 given, 1 overlap an evaluation problem, 1 repeat an earlier question",
        "samples                 6",
        "kept                    2   33.3%   of 2 problems",
        "incorrect               4   66.7%   the rule found it wrong",
        "kept logic              1   50.0%",
        "kept sums               1   25.0%",
        "exam.jsonl: 1 of its problems overlap 1 given",
        "mixed in: 1 from talk.jsonl, of 4 that the weights ask for",
    ]


def test_a_report_of_nothing_can_be_read():
    report = {
        "problems": {"given": 1, "contaminated": 1, "repeated": 0, "no_room": 0, "sampled": 0},
        "yield": Yield().as_json(), "contamination": {}, "mix": [],
    }  # fmt: skip
    assert "1 overlap an evaluation problem" in describe_yield(report)
