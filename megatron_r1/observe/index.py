"""One self-contained page over all runs below a folder: a table, and the curves of those that are chosen in one chart a
metric. Opens from disk without a network.

Everything that a run's files say is escaped. Left out: finding and reading the runs (run_list.py), drawing
(index_script.py: what is drawn is chosen on the page).
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.errors import ConfigError
from megatron_r1.observe.charts import thinned
from megatron_r1.observe.index_script import INDEX_SCRIPT, INDEX_STYLE
from megatron_r1.observe.page import document, write_page
from megatron_r1.observe.pipeline_report import NO_ROLLOUTS
from megatron_r1.observe.report import write_report
from megatron_r1.observe.run_list import ListedRun, is_number, runs_below

CHOSEN = 8
"""Runs that are drawn when the page opens: those that changed last."""

CHARTS = (
    ("Reward", "mean total reward of a completion", "reward_mean", ""),
    ("Accuracy", "share of right answers among the samples", "accuracy", "percent"),
    ("Validation accuracy", "greedy", "eval_accuracy", "percent"),
    ("Length", "mean tokens of a completion", "length_mean", ""),
    ("KL to the reference", "per token, nats", "kl", ""),
    ("Entropy", "of the policy, per token, nats", "entropy", ""),
    ("Loss of RL", "the algorithm's own", "rl_loss", ""),
    ("Loss of SFT", "per trained token, nats", "sft_loss", ""),
    ("Validation loss", "per trained token, nats", "validation_loss", ""),
    ("Loss of pairs", "reward models", "pair_loss", ""),
    ("Pairs ranked right", "reward models", "pair_accuracy", "percent"),
    ("Gradient norm", "before clipping", "grad_norm", ""),
    ("Speed", "tokens per second", "tokens_per_second", ""),
)
"""Title, note, metric, how it is shown. A chart that no run has recorded is left out."""

LAST = (
    ("reward", "reward_mean", ".2f"), ("accuracy", "accuracy", ".1%"), ("loss", "sft_loss", ".4f"),
    ("pairs", "pair_accuracy", ".1%"), ("length", "length_mean", ".1f"), ("KL", "kl", ".3f"),
)  # fmt: skip
"""What the table says of a run's last step: word, metric, form."""


def report_on(folder: Path) -> Path:
    """The page of `folder`: a run's own report.html, or the index.html over the runs below. ConfigError if there are
    none."""
    if not folder.is_dir():
        raise ConfigError([f"report: {folder} is not a folder; name a run's folder, or one of runs, such as runs"])
    if (folder / "run.json").exists() or (folder / "metrics.jsonl").exists():
        return write_report(folder)
    runs = runs_below(folder)
    if not runs:
        raise ConfigError([f"report: there is no run in {folder}; name the folder that your --run-dir folders lie in"])
    path = folder / "index.html"
    write_page(path, render(runs, folder))
    return path


def render(runs: Sequence[ListedRun], root: Path) -> str:
    """The whole page."""
    drawn = [place for place, run in enumerate(runs) if run.metrics and not run.fault]
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    name = html.escape(root.resolve().name)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    head = (
        f"<header><p class=eyebrow>megatron_r1 runs</p><h1>{name}</h1>"
        f"<p class=facts>{len(runs)} run{'s' * (len(runs) != 1)}: {html.escape(counts)}; written {written}</p></header>"
    )
    content = {
        "runs": [run.name for run in runs],
        "colours": {place: number for number, place in enumerate(drawn)},
        "charts": _charts(runs, drawn),
    }
    data = json.dumps(content, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    tail = f'<style>{INDEX_STYLE}</style><script type="application/json" id="index-data">{data}</script>{NO_ROLLOUTS}'
    return document(
        f"{root.resolve().name}: runs", head + _table(runs, drawn, root) + _curves(drawn), tail, INDEX_SCRIPT
    )


def numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with what the charts call by other names: losses by what they are, and the speed where only tokens and
    seconds were written."""
    seconds, found = row.get("seconds"), dict(row)
    found["rl_loss" if "reward_mean" in row else "sft_loss"] = row.get("loss")
    if "tokens_per_second" not in row and is_number(seconds) and seconds and is_number(row.get("tokens")):
        found["tokens_per_second"] = row["tokens"] / seconds
    return found


def _charts(runs: Sequence[ListedRun], drawn: Sequence[int]) -> list[dict[str, Any]]:
    rows = {place: [numbers(row) for row in runs[place].metrics] for place in drawn}
    charts = []
    for title, note, key, form in CHARTS:
        series = {}
        for place in drawn:
            points = [(row["step"], float(row[key])) for row in rows[place] if is_number(row.get(key))]
            if points:
                series[place] = [[x, float(f"{y:.6g}")] for x, y in thinned(points)]
        if series:
            charts.append({"title": title, "note": note, "percent": form == "percent", "series": series})
    return charts


def _table(runs: Sequence[ListedRun], drawn: Sequence[int], root: Path) -> str:
    titles = ("", "Run", "Stage", "Model", "State", "Steps", "Last step", "Result", "Changed")
    head = "".join(f"<th>{title}</th>" for title in titles)
    rows = "".join(_row(run, place, drawn, root) for place, run in enumerate(runs))
    return (
        '<section><h2>Runs</h2><div class="card scroll">'
        f'<table class="wide runs"><tr>{head}</tr>{rows}</table></div></section>'
    )


def _row(run: ListedRun, place: int, drawn: Sequence[int], root: Path) -> str:
    box = ""
    if place in drawn:
        checked = " checked" if drawn.index(place) < CHOSEN else ""
        label = html.escape(f"draw {run.name}", quote=True)
        box = f'<input type="checkbox" class="choose" data-run="{place}" aria-label="{label}"{checked}>'
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
    if run.fault:
        state, fault = html.escape(run.state), html.escape(run.fault)
        cells = f"<td colspan=2></td><td>{state}</td><td colspan=3>{fault}</td><td>{changed}</td>"
        return f"<tr class=faulty><td></td><td>{_linked(run, root)}</td>{cells}</tr>"
    last = numbers(run.metrics[-1]) if run.metrics else {}
    said = ", ".join(f"{word} {last[key]:{form}}" for word, key, form in LAST if is_number(last.get(key)))
    steps = f"{int(last['step']) + 1:,}" if last else "–"
    cells = (run.stage, run.model or "–", run.state, steps, said or "–", run.result)
    rest = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f"<tr><td>{box}</td><td>{_linked(run, root)}</td>{rest}<td>{changed}</td></tr>"


def _linked(run: ListedRun, root: Path) -> str:
    """The run's name, as a link to its own page, or to that of the pipeline that it is a stage of."""
    name, folder = html.escape(run.name), run.folder
    if not (folder / "report.html").exists() and folder != root and (folder.parent / "manifest.json").exists():
        folder = folder.parent
    if not (folder / "report.html").exists():
        return name
    target = (folder.relative_to(root) / "report.html").as_posix()
    # A folder's name may hold what means something in an address.
    address = "".join(letter if letter.isalnum() or letter in "/._-" else _quoted(letter) for letter in target)
    return f'<a href="{address}">{name}</a>'


def _quoted(letter: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogateescape"))


def _curves(drawn: Sequence[int]) -> str:
    if not drawn:
        return '<section><h2>Curves</h2><p class="note">No run here has written a step yet.</p></section>'
    return (
        '<section><h2>Curves</h2><div class="filters"><button type="button" id="all">All runs</button>'
        '<button type="button" id="none">None</button>'
        '<label><input type="checkbox" id="smooth" checked> smoothed</label></div>'
        '<ul class="legend" id="legend"></ul><div class="charts" id="charts"></div>'
        "<noscript><p>The curves need JavaScript.</p></noscript></section>"
    )
