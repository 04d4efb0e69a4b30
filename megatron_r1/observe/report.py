"""One self-contained page about a run, from the files in its folder and nothing else.

Opens from disk without a network. Everything that a model or a configuration wrote is escaped: the page shows
it and never runs it. Works on a run that is still going or that stopped early. Left out: drawing (charts.py),
styling (page.py).
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.observe.charts import Chart, Series, colour_of, line_chart, smoothed, stacked_bars
from megatron_r1.observe.page import document, write_page
from megatron_r1.observe.progress import duration
from megatron_r1.observe.run_files import RunFiles, read_run

PHASES = ("rollout", "reward", "logprob", "train", "sync")


def write_report(run_dir: Path | str) -> Path:
    """Write run_dir/report.html and return its path. DataError if the folder holds no run; OutputError if
    full."""
    files = read_run(Path(run_dir))
    path = Path(run_dir) / "report.html"
    write_page(path, render(files))
    return path


def render(files: RunFiles) -> str:
    """The whole page."""
    body = "".join(
        (
            _header(files),
            _tiles(files),
            _curves(files),
            _time(files),
            _rollouts(files),
            _configuration(files.run),
        )
    )
    # A </script> or <!-- inside a JSON string would end the element: no '<' survives.
    data = json.dumps(list(files.rollouts), ensure_ascii=True).replace("<", "\\u003c")
    return document(files.name, body, f'<script type="application/json" id="rollout-data">{data}</script>')


def _header(files: RunFiles) -> str:
    model = _lookup(files.run, "model", "path")
    template = _lookup(files.run, "data", "template")
    task = _lookup(files.run, "data", "tasks") or _lookup(files.run, "data", "files")
    facts = [
        str(part) for part in (model and Path(model).name, _join(task), template and f"{template} template") if part
    ]
    line = " · ".join(html.escape(fact) for fact in facts)
    name = html.escape(files.name)
    return f"<header><p class=eyebrow>megatron_r1 run</p><h1>{name}</h1><p class=facts>{line}</p></header>"


def _tiles(files: RunFiles) -> str:
    summary, metrics = files.summary, files.metrics
    before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
    seconds = sum(_total_seconds(files).values())
    planned = _lookup(files.run, "grpo", "steps")
    tokens = sum(row.get("tokens") or 0 for row in metrics)
    speed = summary.get("tokens_per_second") or (tokens / seconds if seconds and tokens else None)
    tiles = [_accuracy_tile(before, after)]
    done = summary.get("steps", len(metrics))
    tiles.append(_tile("Steps", f"{done:,}", f"of {planned:,} planned" if planned and planned != done else "all done"))
    if not summary:
        tiles[-1] = _tile("Steps", f"{done:,}", "no summary.json: running or stopped early")
    tiles.append(_tile("Wall-clock time", duration(seconds), f"{seconds / max(done, 1):.2f} s a step"))
    tiles.append(_tile("Speed", "–" if speed is None else f"{speed:,.0f}", "tokens/s, whole loop"))
    tiles.append(_tile("Tokens", _short(tokens), f"{_short(tokens / max(done, 1))} a step"))
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _accuracy_tile(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return _tile("Held-out accuracy", "–", "not measured yet", wide=True)
    shown = [f"{value:.1%}" if value is not None else "–" for value in (before, after)]
    change = f"{(after - before) * 100:+.1f} points, greedy" if before is not None and after is not None else "greedy"
    value = f'<span class="from">{shown[0]}</span><span class="arrow">→</span>{shown[1]}'
    return f'<div class="tile wide"><h2>Held-out accuracy</h2><p class="value">{value}</p><p>{change}</p></div>'


def _tile(title: str, value: str, text: str, *, wide: bool = False) -> str:
    css = "tile wide" if wide else "tile"
    value, text = html.escape(value), html.escape(text)
    return f'<div class="{css}"><h2>{title}</h2><p class="value">{value}</p><p>{text}</p></div>'


def _curves(files: RunFiles) -> str:
    metrics, summary = files.metrics, files.summary
    accuracy, validation = _points(metrics, "accuracy"), _points(metrics, "eval_accuracy")
    last = metrics[-1]["step"] + 1 if metrics else 0
    ends = ((0, summary.get("accuracy_before")), (last, summary.get("accuracy_after")))
    held_out = [(x, value) for x, value in ends if metrics and value is not None]
    charts = [
        Chart(
            title="Accuracy", note="share of right answers", percent=True, low=0.0, high=1.0,
            series=[
                Series(name="each step", points=accuracy, style="faint"),
                Series(name="smoothed", points=smoothed(accuracy)),
                Series(name="validation, greedy", points=validation, colour=3, style="dots"),
                Series(name="held out, greedy", points=held_out, colour=2, style="dots"),
            ],
        ),
        _noisy("Reward", "mean total reward of a completion", metrics, "reward_mean"),
        Chart(
            title="Format", note="share with the think/answer structure", percent=True, low=0.0, high=1.0,
            series=[Series(name="format", points=_points(metrics, "format"))],
        ),
        Chart(
            title="Language", note="share of the thoughts' words in the language", percent=True, low=0.0, high=1.0,
            series=[Series(name="language", points=_points(metrics, "language"))],
        ),
        _noisy("Length", "mean tokens of a completion", metrics, "length_mean"),
        _noisy("KL to the reference", "per token, nats", metrics, "kl", low=0.0),
        _noisy("Entropy", "of the policy, per token, nats", metrics, "entropy"),
        _noisy("Gradient norm", "before clipping", metrics, "grad_norm", low=0.0),
        Chart(
            title="Engine mismatch", note="|logprob vLLM − logprob Megatron| per token, nats", low=0.0,
            series=[
                Series(name="mean", points=_points(metrics, "mismatch")),
                Series(name="99th percentile", points=_points(metrics, "mismatch_p99"), colour=2),
            ],
        ),
        _noisy("Effective samples", "of the tokens' importance weights, share", metrics, "effective_samples"),
        _noisy("Corrected tokens", "share whose weight was truncated or masked", metrics, "correction_cut", low=0.0),
        _noisy("Clip fraction", "share of tokens whose ratio was clipped", metrics, "clip_fraction", low=0.0),
        _noisy("Groups without a signal", "all rewards equal", metrics, "zero_advantage_groups", low=0.0),
    ]  # fmt: skip
    used = [chart for chart in charts if _says_something(chart)] or charts[:1]
    return f'<section><h2>Curves</h2><div class="charts">{"".join(map(line_chart, used))}</div></section>'


def _noisy(title: str, note: str, metrics: Sequence[Mapping[str, Any]], key: str, low: float | None = None) -> Chart:
    """Each step faintly, and its moving average."""
    points = _points(metrics, key)
    curves = [
        Series(name="each step", points=points, style="faint"),
        Series(name="smoothed", points=smoothed(points)),
    ]
    return Chart(title=title, note=note, low=low, series=curves)


def _says_something(chart: Chart) -> bool:
    """False for a quantity that was not recorded or was zero throughout (e.g. no ratio was ever clipped)."""
    return any(value != 0 for series in chart.series for _, value in series.points)


def _time(files: RunFiles) -> str:
    totals = _total_seconds(files)
    whole = sum(totals.values())
    if not whole:
        return ""
    names = _charted(totals)
    colours = {name: colour_of(i, len(names)) for i, name in enumerate(names)}
    shares = "".join(
        f'<div class="fill-{colours.get(name, 0)}" style="flex:{seconds / whole:.5f}" '
        f'title="{html.escape(name, quote=True)}: {seconds:.1f} s"></div>'
        for name, seconds in totals.items()
        if seconds > 0
    )
    rows = "".join(
        f'<tr><td><i class="key fill-{colours.get(name, 0)}"></i>{html.escape(name)}</td>'
        f"<td>{seconds:,.1f} s</td><td>{seconds / whole:.1%}</td></tr>"
        for name, seconds in totals.items()
    )
    timed = [row for row in files.metrics if isinstance(row.get("seconds"), Mapping)]
    values = [[float(row["seconds"].get(name) or 0.0) for name in names[:-1]] for row in timed]
    for row, known in zip(timed, values, strict=True):
        known.append(max(sum(float(value or 0.0) for value in row["seconds"].values()) - sum(known), 0.0))
    bars = stacked_bars("Each step", names, values, [row["step"] for row in timed])
    return (
        '<section><h2>Where the time went</h2><div class="charts two">'
        '<figure class="card"><figcaption><h3>Whole run</h3>'
        f'<p class="note">{whole:,.1f} s in all</p></figcaption><div class="share">{shares}</div>'
        f"<table class=plain>{rows}</table></figure>{bars}</div></section>"
    )


def _charted(totals: Mapping[str, float]) -> list[str]:
    """The phases that get a colour of their own (the six largest, in table order), then "other" for the
    rest."""
    named = [name for name in totals if name != "other"]
    largest = sorted(named, key=lambda name: -totals[name])[:6]
    return [name for name in named if name in largest] + ["other"]


def _rollouts(files: RunFiles) -> str:
    if not files.rollouts:
        return ""
    shown = f"{len(files.rollouts):,} of {files.num_rollouts:,} recorded completions"
    more = "" if len(files.rollouts) == files.num_rollouts else "; all of them are in rollouts.jsonl"
    return (
        f'<section id="rollouts"><h2>Rollouts</h2><p class="note">{shown}{more}.</p>'
        '<form class="filters" onsubmit="return false">'
        '<label>Step <select id="step"><option value="">all</option></select></label>'
        '<label>Outcome <select id="outcome"><option value="">all</option>'
        '<option value="right">right answer</option><option value="wrong">wrong answer</option>'
        '<option value="form">broken format</option></select></label>'
        '<label>Search <input id="search" type="search" placeholder="text or problem id"></label>'
        '<output id="count"></output></form><div id="list"></div>'
        '<button id="more" type="button">Show more</button>'
        "<noscript><p>The browser of rollouts needs JavaScript.</p></noscript></section>"
    )


def _configuration(run: Mapping[str, Any]) -> str:
    groups: dict[str, list[tuple[str, Any]]] = {}
    for path, value in _flatten(run):
        groups.setdefault(path[0] if len(path) > 1 else "run", []).append((".".join(path[1:] or path), value))
    tables = "".join(
        f"<table><caption>{html.escape(name)}</caption>"
        + "".join(
            f"<tr><th>{html.escape(key)}</th><td>{html.escape(_join(value) or '–')}</td></tr>" for key, value in rows
        )
        + "</table>"
        for name, rows in groups.items()
    )
    content = f'<summary>Configuration</summary><div class="config">{tables}</div>'
    return f"<section><details>{content}</details></section>"


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _total_seconds(files: RunFiles) -> dict[str, float]:
    """Seconds by phase: the summary's, else the sum over steps; known phases first, "other" last."""
    totals: dict[str, float] = {}
    given = files.summary.get("seconds")
    rows = [given] if isinstance(given, Mapping) else [row.get("seconds") or {} for row in files.metrics]
    for row in rows:
        for name, value in row.items():
            totals[name] = totals.get(name, 0.0) + float(value or 0.0)
    order = [name for name in PHASES if name in totals] + sorted(set(totals) - {*PHASES, "other"})
    return {name: totals[name] for name in order} | {"other": totals.get("other", 0.0)} if totals else {}


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], float(row[key])) for row in metrics if isinstance(row.get(key), int | float)]


def _lookup(tree: Mapping[str, Any], *path: str) -> Any:
    """tree[path[0]][path[1]]..., looking below a `config` key too; None where there is none."""
    for root in (tree, tree.get("config")):
        here: Any = root
        for key in path:
            here = here.get(key) if isinstance(here, Mapping) else None
        if here is not None:
            return here
    return None


def _join(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _short(count: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"
