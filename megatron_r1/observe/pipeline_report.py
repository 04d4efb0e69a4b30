"""One page about a pipeline, from its manifest and its stages' folders: what each stage cost and what it changed.

Works while the pipeline runs and after a stage has failed. Everything that a model or a configuration wrote is escaped.
Left out: a stage's own page (report.py).
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.config.run_folder import is_held
from megatron_r1.observe.charts import Chart, Series, line_chart, smoothed
from megatron_r1.observe.metrics import read_json_lines
from megatron_r1.observe.page import document, write_page
from megatron_r1.observe.progress import duration

QUALITIES = ("accuracy", "format", "language", "length")
COLOURS = 6
NO_ROLLOUTS = '<script type="application/json" id="rollout-data">[]</script>'

RESULTS = (
    "accuracy {accuracy_before:.1%} → {accuracy_after:.1%}",
    "pairs ranked right {pair_accuracy_before:.1%} → {pair_accuracy_after:.1%}",
    "validation loss {validation_loss_before:.3f} → {validation_loss_after:.3f}",
    "loss {loss_first:.3f} → {loss_last:.3f}",
    "{kept:,} of {samples:,} samples kept",
    "accuracy {accuracy:.1%}",
)
"""What a stage's summary.json says, the most telling first."""


def write_pipeline_report(run_dir: Path, stages: Sequence[str]) -> Path:
    """Write run_dir/report.html and return its path. OutputError if it cannot be written."""
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    path = run_dir / "report.html"
    write_page(path, render(manifest, run_dir, stages))
    return path


def render(manifest: Mapping[str, Any], run_dir: Path, stages: Sequence[str]) -> str:
    """The whole page. `stages` in the pipeline's order; those without a record have not run."""
    name = str(manifest["pipeline"])
    records = {stage: manifest["stages"].get(stage, {}) for stage in stages}
    seconds = sum(float(record.get("seconds") or 0.0) for record in records.values())
    done = sum(record.get("state") == "done" for record in records.values())
    head = (
        f"<header><p class=eyebrow>megatron_r1 pipeline</p><h1>{html.escape(name)}</h1>"
        f"<p class=facts>{done} of {len(stages)} stages done, {duration(seconds)} of work</p></header>"
    )
    body = head + _table(records, run_dir) + _qualities(records) + _curves(run_dir, stages) + _yields(run_dir, stages)
    return document(name, body, NO_ROLLOUTS)


def _table(records: Mapping[str, Mapping[str, Any]], run_dir: Path) -> str:
    rows = "".join(
        f"<tr><td>{_link(stage, run_dir)}</td><td>{html.escape(_state(record, run_dir / stage))}</td>"
        f"<td>{duration(record['seconds']) if record.get('seconds') else '–'}</td>"
        f"<td>{html.escape(', '.join(_parents(record)) or '–')}</td><td>{html.escape(_result(record))}</td></tr>"
        for stage, record in records.items()
    )
    head = "<tr><th>Stage</th><th>State</th><th>Time</th><th>Made from</th><th>Result</th></tr>"
    return f'<section><h2>Stages</h2><div class="card"><table class="wide">{head}{rows}</table></div></section>'


def _state(record: Mapping[str, Any], folder: Path) -> str:
    """What the manifest says; a stage that was running when its process was killed has left its folder unlocked."""
    state = str(record.get("state", "not run"))
    started = (folder / "run.json").exists()
    return "interrupted" if state == "running" and started and not is_held(folder) else state


def _link(stage: str, run_dir: Path) -> str:
    name = html.escape(stage)
    return f'<a href="{name}/report.html">{name}</a>' if (run_dir / stage / "report.html").exists() else name


def _parents(record: Mapping[str, Any]) -> list[str]:
    stages = [known.get("stage") for known in record.get("inputs", {}).values()]
    return list(dict.fromkeys(stage for stage in stages if stage))


def _result(record: Mapping[str, Any]) -> str:
    return result_in_words(record.get("metrics") or {})


def result_in_words(metrics: Mapping[str, Any]) -> str:
    """The numbers of a stage's summary.json in a few words: the first of RESULTS whose numbers are all there."""
    for words in RESULTS:
        try:
            return words.format_map(metrics)
        except (KeyError, TypeError, ValueError):  # not there, or None: another kind's, or not measured
            continue
    return "–"


def _qualities(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What the models do on the held-out problems, before and after each stage that measured it."""
    rows = []
    for stage, record in records.items():
        for when in ("before", "after"):
            held_out = (record.get("metrics") or {}).get(f"held_out_{when}")
            if held_out:
                cells = "".join(f"<td>{_quality(name, held_out.get(name))}</td>" for name in QUALITIES)
                rows.append(f"<tr><td>{html.escape(stage)}, {when}</td>{cells}</tr>")
    if not rows:
        return ""
    head = "<tr><th>Model</th><th>Accuracy</th><th>Format</th><th>Language</th><th>Length</th></tr>"
    note = '<p class="note">Greedy answers to the held-out problems; language is the share of words of the thought.</p>'
    table = f'<div class="card"><table class="wide">{head}{"".join(rows)}</table></div>'
    return f"<section><h2>Held-out problems by stage</h2>{note}{table}</section>"


def _quality(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f} tokens" if name == "length" else f"{value:.1%}"


def _curves(run_dir: Path, stages: Sequence[str]) -> str:
    rows = {stage: list(read_json_lines(run_dir / stage / "metrics.jsonl")) for stage in stages}
    charts = [
        _chart("Accuracy in RL", "share of right answers", rows, "accuracy", percent=True),
        _chart("Format in RL", "share with the think/answer structure", rows, "format", percent=True),
        _chart("Language in RL", "share of words in the language", rows, "language", percent=True),
        _chart("Length in RL", "mean tokens of a completion", rows, "length_mean"),
        _chart("Loss in SFT", "per trained token, nats", rows, "loss", without="reward_mean"),
        _chart("Validation loss in SFT", "per trained token, nats", rows, "validation_loss"),
    ]
    drawn = [chart for chart in charts if chart.series]
    return f'<section><h2>Curves</h2><div class="charts">{"".join(map(line_chart, drawn))}</div></section>'


def _chart(
    title: str,
    note: str,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    key: str,
    *,
    percent: bool = False,
    without: str = "",
) -> Chart:
    """One smoothed curve a stage that recorded `key` (and not `without`)."""
    series = []
    for stage, of_stage in rows.items():
        points = [
            (float(row["step"]), float(row[key]))
            for row in of_stage
            if isinstance(row.get(key), int | float) and without not in row
        ]
        if points:
            colour = len(series) % COLOURS + 1
            series.append(Series(name=stage, points=smoothed(points), colour=colour))
    bounds = {"low": 0.0, "high": 1.0} if percent else {}
    return Chart(title=title, note=note, percent=percent, series=series, **bounds)


def _yields(run_dir: Path, stages: Sequence[str]) -> str:
    """What rejection sampling kept and why it dropped the rest."""
    parts = []
    for stage in stages:
        file = run_dir / stage / "yield.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))["yield"]["all"]
        total = max(int(found["samples"]), 1)
        counted = {"kept": found["kept"], **found["dropped"]}
        rows = "".join(
            f"<tr><td>{html.escape(reason.replace('_', ' '))}</td><td>{count:,}</td><td>{count / total:.1%}</td></tr>"
            for reason, count in counted.items()
        )
        parts.append(
            f'<figure class="card"><figcaption><h3>{html.escape(stage)}</h3>'
            f'<p class="note">{total:,} samples</p></figcaption><table class=plain>{rows}</table></figure>'
        )
    if not parts:
        return ""
    return f'<section><h2>Yield of rejection sampling</h2><div class="charts two">{"".join(parts)}</div></section>'
