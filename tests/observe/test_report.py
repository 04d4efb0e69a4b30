"""The report says what the run files say, runs nothing that a model wrote, and copes with half a run."""

import json
import re
from html.parser import HTMLParser

import pytest

from megatron_r1.errors import DataError
from megatron_r1.observe.charts import (
    Chart,
    Series,
    line_chart,
    number,
    smoothed,
    stacked_bars,
    thinned,
    ticks,
)
from megatron_r1.observe.metrics import JsonLines, write_json
from megatron_r1.observe.report import write_report
from megatron_r1.observe.run_files import MAX_CHARACTERS, MAX_ROLLOUTS, read_run

EVIL = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>"


class Elements(HTMLParser):
    """Every start tag with its attributes, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def make_run(folder, *, steps=4, summary=True, evil=""):
    config = {
        "name": "tiny" + evil,
        "grpo": {"steps": steps},
        "model": {"path": "m" + evil},
        "data": {"tasks": ["t"]},
    }
    write_json(folder / "run.json", config)
    with JsonLines(folder / "metrics.jsonl") as metrics, JsonLines(folder / "rollouts.jsonl") as rollouts:
        for step in range(steps):
            metrics.write(
                {
                    "step": step, "accuracy": step / 10, "format": 1.0, "reward_mean": 1 + step / 10,
                    "tokens": 500, "seconds": {"rollout": 2.0, "train": 1.0, "other": 0.5}, "kl": 0.0,
                    "clip_fraction": 0.0,
                }
            )  # fmt: skip
            rollouts.write(
                {
                    "step": step, "problem_id": "p" + evil, "prompt": "q" + evil, "completion": "a" + evil,
                    "answer": "1", "reward": 1.0, "parts": {"accuracy": 1.0, "format": 0.0}, "advantage": 0.5,
                    "tokens": 3, "finish_reason": "stop", "weight_version": step,
                }
            )  # fmt: skip
    if summary:
        content = {
            "accuracy_before": 0.25,
            "accuracy_after": 0.875,
            "steps": steps,
            "tokens_per_second": 1234.4,
        }
        write_json(folder / "summary.json", content)


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


def visible(text):
    body = re.sub(r"<(style|script)\b.*?</\1>", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def test_headline_numbers(tmp_path):
    make_run(tmp_path)
    text = visible(page_of(tmp_path))
    assert "25.0% → 87.5%" in text and "+62.5 points" in text
    assert "Steps 4 all done" in text
    assert "Wall-clock time 14s 3.50 s a step" in text  # 4 * (2 + 1 + 0.5)
    assert "Speed 1,234 tokens/s" in text
    assert "Tokens 2k 500 a step" in text
    assert "rollout 8.0 s 57.1%" in text and "train 4.0 s 28.6%" in text and "other 2.0 s 14.3%" in text


def test_small_phases_share_the_colour_of_other(tmp_path):
    make_run(tmp_path, summary=False)
    with JsonLines(tmp_path / "metrics.jsonl") as metrics:
        seconds = {name: 10.0 for name in ("reward", "logprob", "sync", "evaluate")} | {
            "packing": 1.5,
            "other": 1.0,
        }
        metrics.write({"step": 4, "accuracy": 0.5, "seconds": seconds})
    text = page_of(tmp_path)
    assert len(set(re.findall(r'fill-(\d)"></i>(?:rollout|reward|logprob|train|sync|evaluate)</td>', text))) == 6
    assert re.findall(r'fill-(\d)"></i>(?:packing|other)</td>', text) == ["0", "0"]
    assert "packing 1.5 s" in visible(text)
    bars = json.loads(re.findall(r'data-chart="(.*?)"', text)[-1].replace("&quot;", '"'))["bars"]
    assert bars[-1]["values"][-1] == 2.5  # packing and other
    assert sum(bars[-1]["values"]) == 42.5


def test_curves_of_one_chart_have_colours_of_their_own(tmp_path):
    """All quantities that a report can draw; what is faint is each step's value of the curve that is smoothed."""
    make_run(tmp_path)
    names = ("mismatch", "mismatch_p99", "eval_accuracy", "language", "entropy", "grad_norm", "correction_cut")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    with JsonLines(tmp_path / "metrics.jsonl") as metrics:
        for number, row in enumerate(rows):
            metrics.write(row | {name: 0.1 * (number + 1) for name in names})
    figures = re.findall(r"<figure.*?</figure>", page_of(tmp_path), re.DOTALL)
    assert len(figures) > 8
    for figure in figures:
        drawn = re.findall(r'class="curve stroke-(\d)"', figure)
        assert len(drawn) == len(set(drawn)), figure[:200]


def test_nothing_that_a_model_or_a_config_wrote_becomes_markup(tmp_path):
    make_run(tmp_path, evil=EVIL)
    text = page_of(tmp_path)
    tags = Elements(text).tags
    clean = tmp_path / "clean"
    clean.mkdir()
    make_run(clean)
    assert [tag for tag, _ in tags] == [tag for tag, _ in Elements(page_of(clean)).tags]
    assert not [tag for tag, attributes in tags if tag == "img" or "onerror" in attributes]
    data = re.search(r'id="rollout-data">(.*?)</script>', text, re.DOTALL).group(1)
    assert json.loads(data)[0]["completion"] == "a" + EVIL


def test_page_fetches_nothing(tmp_path):
    make_run(tmp_path)
    text = page_of(tmp_path)
    tags = Elements(text).tags
    assert not [a for _, a in tags if {"src", "href"} & set(a)]
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert "innerHTML" not in text


def test_run_without_summary_or_rollouts_is_shown_as_unfinished(tmp_path):
    make_run(tmp_path, summary=False)
    (tmp_path / "rollouts.jsonl").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "acc')
    text = visible(page_of(tmp_path))
    assert "Steps 4 no summary.json" in text and "not measured yet" in text
    assert "Speed 143 tokens/s" in text  # 2000 tokens in 14 s
    assert "Rollouts" not in text


def test_folder_without_a_run_is_refused_and_damage_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no run\.json and no metrics\.jsonl"):
        write_report(tmp_path)
    make_run(tmp_path)
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(DataError, match=r"summary\.json: a JSON list"):
        write_report(tmp_path)


def test_charts_that_say_nothing_are_left_out(tmp_path):
    make_run(tmp_path)
    titles = re.findall(r"<h3>(.*?)</h3>", page_of(tmp_path))
    assert titles == ["Accuracy", "Reward", "Format", "Whole run", "Each step"]


def test_rollouts_are_sampled_over_the_whole_run(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with JsonLines(tmp_path / "rollouts.jsonl") as log:
        for step in range(3 * MAX_ROLLOUTS):
            log.write({"step": step, "prompt": "p", "completion": "x" * (MAX_CHARACTERS + 7)})
    files = read_run(tmp_path)
    assert [record["step"] for record in files.rollouts] == list(range(0, 3 * MAX_ROLLOUTS, 3))
    assert files.num_rollouts == 3 * MAX_ROLLOUTS
    assert files.rollouts[0]["completion"].endswith("x… [7 more characters]")


def test_ticks_are_round_and_inside():
    assert ticks(0, 1, 4) == [0, 0.5, 1]
    assert ticks(0, 60, 5) == [0, 20, 40, 60]
    assert ticks(1.31, 1.92, 4) == [1.4, 1.6, 1.8]
    assert ticks(-0.003, 0.012, 4) == [0, 0.005, 0.01]
    assert ticks(3, 3) == [3]
    assert ticks(0, 2.1e-15, 4) == [0, 1e-15, 2e-15]


def test_tick_labels_have_the_decimals_they_need():
    assert number(0.5, [0, 0.5, 1], True) == "50%"
    assert number(1.4, [1.4, 1.6], False) == "1.4"
    assert number(0.005, [0, 0.005, 0.01], False) == "0.005"
    assert number(20000, [0, 20000], False) == "20,000"
    assert number(2e-7, [0, 2e-7], False) == "2e-07"


def test_smoothing_keeps_a_trend_in_place_and_thinning_keeps_the_mean():
    line = [(i, 2.0 * i) for i in range(50)]
    assert [y for _, y in smoothed(line)] == pytest.approx([y for _, y in line])
    assert smoothed([(0, 0), (1, 3), (2, 0)], half_window=1)[1] == (1, 1.0)
    thin = thinned([(i, float(i % 2)) for i in range(1000)], limit=100)
    assert len(thin) == 100 and {y for _, y in thin} == {0.5}
    assert thin[0][0] == 4.5


@pytest.mark.parametrize("values", [(1.0, 1.0 - 1e-13), (3e-7, 2.1e-7), (1e-15, 2e-15), (0.0, 0.0), (1e12, 1e12 + 1)])
def test_a_curve_of_numbers_that_hardly_differ_is_drawn(values):
    drawn = line_chart(Chart(title="t", series=[Series(name="s", points=list(enumerate(values)))]))
    labels = re.findall(r'text-anchor="end">([^<]+)</text>', drawn)
    assert len(labels) == len(set(labels)) >= 2


def test_curve_is_drawn_where_its_numbers_are():
    series = [Series(name="s", points=[(0, 0.0), (10, 1.0)])]
    svg = line_chart(Chart(title="T<", series=series, low=0.0, high=1.0))
    # 440 x 230 with margins 50, 12 (sides) and 12, 34 (top, bottom): (50, 196) to (428, 12)
    assert 'points="50.0,196.0 428.0,12.0"' in svg
    assert "<h3>T&lt;</h3>" in svg
    assert "not recorded" in line_chart(Chart(title="T", series=[Series(name="s", points=[])]))


def test_a_band_is_drawn_around_its_curve_and_widens_the_axis():
    band = [(0, 0.0, 0.0), (10, 0.0, 2.0)]
    svg = line_chart(Chart(title="T", series=[Series(name="s", points=[(0, 0.0), (10, 1.0)], band=band)], low=0.0))
    low, middle, high = ("196.0", "109.2", "22.4")  # the axis ends 6% above 2
    assert f'points="50.0,{low} 428.0,{middle}"' in svg
    assert f'<polygon class="band fill-1" points="50.0,{low} 428.0,{low} 428.0,{high} 50.0,{low}"/>' in svg


def test_stacked_bars_reach_their_sum():
    svg = stacked_bars("S", ["a", "other"], [[1.0, 3.0]], [7])
    bars = re.findall(r'<rect class="fill-(\d)".*? y="([\d.]+)".*? height="([\d.]+)"', svg)
    heights = [float(height) for _, _, height in bars]
    assert [colour for colour, _, _ in bars] == ["1", "0"]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.3)
    assert sum(heights) == pytest.approx(184 / 1.06, abs=0.3)
    assert "step 7" not in svg and '"label":"7"' in svg.replace("&quot;", '"')
