"""Line and stacked-bar charts as inline SVG: no script is needed to read them, no library to draw them.

Colours are the page's CSS variables (`--series-1` ...), so one drawing serves light and dark. Values under
the pointer come from `data-*` attributes that page.js reads. Left out: choosing what to draw (report.py).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 34
MAX_POINTS = 400
"""A curve of more steps is drawn as the means of this many runs of steps."""
MAX_BARS = 60

Style = Literal["line", "faint", "dots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: `points` are (step, value); `colour` is 1 to 6 (the page's palette) or 0 for grey. `band`: (step, low,
    high) around it, such as a spread over seeds."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    style: Style = "line"
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """`percent` labels the vertical axis in per cent; `low` and `high` pin its ends; `note` says what it
    shows."""

    title: str
    series: Sequence[Series]
    note: str = ""
    percent: bool = False
    low: float | None = None
    high: float | None = None


FLAT = 1e-9
"""Curves that differ by less, relative to their values, are drawn as a flat line."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` + 1 round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def smoothed(points: Sequence[tuple[float, float]], half_window: int | None = None) -> list[tuple[float, float]]:
    """Centred moving average, so that a trend is not drawn late. The window of 2 * half_window + 1 points
    (about a tenth of the curve) narrows evenly towards both ends."""
    half = max(1, min(len(points) // 20, 50)) if half_window is None else half_window
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        result.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def thinned(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """The points themselves, or the means of `limit` equal runs of them."""
    if len(points) <= limit:
        return list(points)
    edges = [len(points) * i // limit for i in range(limit + 1)]
    runs = [points[start:end] for start, end in pairwise(edges)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def line_chart(chart: Chart) -> str:
    """A <figure> with the chart, or with a sentence where there is nothing to draw."""
    drawn = [(series, thinned(series.points)) for series in chart.series if series.points]
    if not drawn:
        return _figure(chart.title, chart.note, "", '<p class="empty">not recorded in this run</p>')
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    ys += [y for series, _ in drawn for _, *edges in series.band for y in edges]
    x_range = _spread(min(xs), max(xs))
    low = min(ys) if chart.low is None else chart.low
    high = max(ys) if chart.high is None else chart.high
    y_range = _spread(low, high, pad=0.0 if chart.low is not None and chart.high is not None else 0.06)
    if chart.low is not None:
        y_range = (chart.low, y_range[1])
    frame = _Frame(x_range=x_range, y_range=y_range, percent=chart.percent)
    marks = "".join(_marks(series, points, frame) for series, points in drawn)
    data = [
        {"name": s.name, "colour": s.colour, "points": [[x, y, frame.x(x), frame.y(y)] for x, y in points]}
        for s, points in drawn
    ]
    legend = _legend([(s.name, s.colour, s.style) for s, _ in drawn]) if len(drawn) > 1 else ""
    svg = frame.svg(chart.title, marks, data=data)
    return _figure(chart.title, chart.note, legend, svg)


def stacked_bars(title: str, names: Sequence[str], rows: Sequence[Sequence[float]], steps: Sequence[int]) -> str:
    """Seconds by phase and step: rows[i][k] is phase names[k] in step steps[i]; bars are means of runs of
    steps."""
    if not rows:
        return _figure(title, "", "", '<p class="empty">not recorded in this run</p>')
    bars = _binned(rows, steps)
    y_range = (0.0, max(sum(values) for _, _, values in bars) * 1.06 or 1.0)
    frame = _Frame(x_range=(bars[0][0] - 0.5, bars[-1][1] + 0.5), y_range=y_range, percent=False)
    parts = []
    data = []
    for first, last, values in bars:
        left, right = frame.x(first - 0.5), frame.x(last + 0.5)
        gap = min(2.0, (right - left) * 0.25)
        below = 0.0
        for place, value in enumerate(values):
            top, bottom = frame.y(below + value), frame.y(below)
            below += value
            if bottom - top > 0.05:
                parts.append(
                    f'<rect class="fill-{colour_of(place, len(names))}" x="{left + gap / 2:.1f}" '
                    f'y="{top:.1f}" width="{right - left - gap:.1f}" height="{bottom - top:.1f}"/>'
                )
        label = str(first) if first == last else f"{first}–{last}"
        data.append({"x": (left + right) / 2, "label": label, "values": [round(v, 4) for v in values]})
    names_and_colours = [[name, colour_of(i, len(names))] for i, name in enumerate(names)]
    legend = [(str(name), int(colour), "box") for name, colour in names_and_colours]
    svg = frame.svg(title, "".join(parts), data={"names": names_and_colours, "bars": data})
    return _figure(title, "seconds of wall-clock time per step", _legend(legend), svg)


def colour_of(place: int, count: int) -> int:
    """Palette number of the place-th of `count` parts; the last part, "other", is grey."""
    return 0 if place == count - 1 else place % 6 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """The plotting area: data ranges to pixels, axes, grid and labels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    percent: bool

    def x(self, value: float) -> float:
        share = (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return round(HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    def svg(self, title: str, marks: str, *, data: object) -> str:
        y_ticks = ticks(*self.y_range, count=4)
        x_ticks = [tick for tick in ticks(*self.x_range, count=5) if tick == int(tick)]
        grid = "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(t)}" y2="{self.y(t)}"/>'
            f'<text x="{LEFT - 7}" y="{self.y(t) + 3.5}" text-anchor="end">'
            f"{number(t, y_ticks, self.percent)}</text>"
            for t in y_ticks
        )
        bottom = HEIGHT - BOTTOM
        axis = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>' + "".join(
            f'<text x="{self.x(t)}" y="{bottom + 15}" text-anchor="middle">{int(t):,}</text>' for t in x_ticks
        )
        axis += f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>'
        payload = html.escape(json.dumps(data, separators=(",", ":")), quote=True)
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}" '
            f'data-chart="{payload}" data-percent="{int(self.percent)}">{grid}{axis}{marks}'
            f'<line class="cursor" y1="{TOP}" y2="{bottom}"/><g class="heads"></g></svg>'
        )


def number(value: float, shown: Sequence[float], percent: bool) -> str:
    """A tick label with as many decimals as the spacing of `shown` needs."""
    if percent:
        return f"{value * 100:.3g}%"
    if abs(value) >= 1e5 or 0 < max(map(abs, shown)) < 1e-3:
        return f"{value:.3g}"
    spacing = min((b - a for a, b in pairwise(shown)), default=abs(value) or 1)
    return f"{value:,.{max(0, -math.floor(math.log10(spacing) + 1e-9))}f}"


def _marks(series: Series, points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    path, area = _path(points, frame), ""
    if series.band:
        low = thinned([(x, least) for x, least, _ in series.band])
        high = thinned([(x, most) for x, _, most in series.band])
        area = f'<polygon class="band fill-{series.colour}" points="{_path([*low, *reversed(high)], frame)}"/>'
    css = "curve faint" if series.style == "faint" else "curve"
    line = area + f'<polyline class="{css} stroke-{series.colour}" points="{path}"/>'
    if series.style == "dots" or len(points) == 1:
        line += "".join(
            f'<circle class="dot fill-{series.colour}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="4"/>' for x, y in points
        )
    return line


def _path(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    return " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in points)


def _legend(entries: Sequence[tuple[str, int, str]]) -> str:
    items = "".join(
        f'<li><i class="key key-{style} fill-{colour}"></i>{html.escape(name)}</li>' for name, colour, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _figure(title: str, note: str, legend: str, body: str) -> str:
    text = f'<p class="note">{html.escape(note)}</p>' if note else ""
    caption = f"<figcaption><h3>{html.escape(title)}</h3>{text}{legend}</figcaption>"
    return f'<figure class="card">{caption}{body}</figure>'


def _spread(low: float, high: float, pad: float = 0.0) -> tuple[float, float]:
    """A range of positive width, widened by `pad` of it on both sides. What rounding alone sets apart is one number."""
    if not high - low > FLAT * max(abs(low), abs(high)):
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - (high - low) * pad, high + (high - low) * pad


def _binned(rows: Sequence[Sequence[float]], steps: Sequence[int]) -> list[tuple[int, int, list[float]]]:
    """(first step, last step, mean seconds by phase) of at most MAX_BARS runs of steps."""
    count = min(len(rows), MAX_BARS)
    edges = [len(rows) * i // count for i in range(count + 1)]
    bars = []
    for start, end in pairwise(edges):
        means = [sum(column) / (end - start) for column in zip(*rows[start:end], strict=True)]
        bars.append((steps[start], steps[end - 1], means))
    return bars
