"""A simulated step as one SVG: phases of each way of running the loop, sequences that run, and a 1F1B schedule.

The drawing needs nothing beside it; colours are those of the reports (observe/page.py), in light and dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.planning.rollouts import Timeline
from megatron_r1.planning.schedule import Slot

WIDTH, LEFT, RIGHT = 1100, 210, 24
ROW, GAP = 26, 10
STYLE = """
text{font:13px system-ui,sans-serif;fill:#14140f}.soft{fill:#55544e;font-size:12px}
.title{font-size:19px;font-weight:650}
.head{font-size:15px;font-weight:600}.page{fill:#f6f6f3}.card{fill:#fff}.axis{stroke:#b9b8b0}.rollout{fill:#2a78d6}
.trainer{fill:#1baf7a}.sync{fill:#e0a100}.backward{fill:#4a3aa7}.curve{fill:none;stroke:#2a78d6;stroke-width:2}
.bar{font-size:12px;fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#f4f4ef}.soft{fill:#c0bfb6}.page{fill:#111110}.card{fill:#1b1b19}
.axis{stroke:#4a4a44}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """Mean seconds of a step by phase, in one way of running the loop; `step` is less than their sum where phases
    overlap. `wasted` is the share of sampled tokens that no step trained on; `stale` of trained tokens that an older
    policy sampled; `first` is the first step's rollout."""

    name: str
    rollout: float
    trainer: float
    sync: float
    step: float
    wasted: float
    stale: float
    overlapped: bool
    first: Timeline


def draw(walked: Sequence[Walked], slots: Sequence[Slot], *, title: str) -> str:
    """The whole SVG document."""
    parts, y = [_text(24, 36, title, "title")], 62
    for part in (lambda at: _phases(walked, at), lambda at: _running(walked[0], at), lambda at: _schedule(slots, at)):
        drawn, end = part(y)
        parts.append(drawn)
        y = end + 26
    height = y
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f'<rect class="page" width="{WIDTH}" height="{height}"/>{"".join(parts)}</svg>\n'
    )


def _phases(walked: Sequence[Walked], top: int) -> tuple[str, int]:
    """One bar a way: what overlaps is drawn as two half bars."""
    scale = (WIDTH - LEFT - RIGHT - 90) / max(way.step for way in walked)
    parts = [_text(24, top + 12, "Seconds of a step", "head")]
    parts += _legend(
        LEFT, top + 2, (("rollout", "rollout"), ("trainer", "logprobs and training"), ("sync", "weight sync"))
    )
    y = top + 30
    for way in walked:
        parts.append(_text(LEFT - 12, y + 18, way.name, "", "end"))
        if way.overlapped:
            parts.append(_bar(LEFT, y, way.rollout * scale, ROW / 2 - 1, "rollout"))
            parts.append(_bar(LEFT, y + ROW / 2, way.trainer * scale, ROW / 2 - 1, "trainer"))
            at = max(way.rollout, way.trainer)
        else:
            parts.append(_bar(LEFT, y, way.rollout * scale, ROW - 1, "rollout"))
            parts.append(_bar(LEFT + way.rollout * scale, y, way.trainer * scale, ROW - 1, "trainer"))
            at = way.rollout + way.trainer
        parts.append(_bar(LEFT + at * scale, y, way.sync * scale, ROW - 1, "sync"))
        parts.append(_text(LEFT + way.step * scale + 8, y + 18, f"{way.step:,.0f} s", "soft"))
        y += ROW + GAP
    return "".join(parts), y


def _running(way: Walked, top: int) -> tuple[str, int]:
    """How many sequences run on all servers together, over the first rollout."""
    points = way.first.running
    most, end = max(count for _, count in points), way.first.seconds
    height, wide = 120, WIDTH - LEFT - RIGHT - 90
    base = top + 24 + height
    each = max(1, len(points) // 800)
    drawn = [*points[::each], points[-1]]
    line = " ".join(f"{LEFT + t / end * wide:.1f},{base - count / most * height:.1f}" for t, count in drawn)
    parts = [
        _text(24, top + 12, "Sequences that run", "head"),
        _text(LEFT, top + 12, f"{way.name}, first rollout: {len(way.first.spans):,} spans on the servers", "soft"),
        f'<line class="axis" x1="{LEFT}" x2="{LEFT + wide}" y1="{base}" y2="{base}"/>',
        f'<polyline class="curve" points="{line}"/>',
        _text(LEFT - 12, top + 34, f"{most:,}", "soft", "end"),
        _text(LEFT - 12, base + 4, "0", "soft", "end"),
        _text(LEFT, base + 18, "0 s", "soft"),
        _text(LEFT + wide, base + 18, f"{end:,.0f} s", "soft", "end"),
    ]
    return "".join(parts), base + 24


def _schedule(slots: Sequence[Slot], top: int) -> tuple[str, int]:
    """One row a pipeline rank; white is the bubble."""
    end, ranks = max(slot.end for slot in slots), 1 + max(slot.rank for slot in slots)
    wide, each = WIDTH - LEFT - RIGHT - 90, 13
    parts = [_text(24, top + 12, "One optimizer step", "head")]
    parts += _legend(LEFT, top + 2, (("trainer", "1F1B: forward"), ("backward", "backward, recomputation included")))
    y = top + 28
    parts.append(f'<rect class="card" x="{LEFT}" y="{y}" width="{wide}" height="{ranks * each}"/>')
    for slot in slots:
        x, width = LEFT + slot.start / end * wide, (slot.end - slot.start) / end * wide
        css = "trainer" if slot.forward else "backward"
        parts.append(_bar(x, y + slot.rank * each, max(0.3, width - 0.4), each - 2, css))
    parts.append(_text(LEFT - 12, y + 10, "pipeline rank 0", "soft", "end"))
    parts.append(_text(LEFT - 12, y + ranks * each - 2, f"{ranks - 1}", "soft", "end"))
    base = y + ranks * each
    parts.append(_text(LEFT + wide, base + 18, f"{end:,.1f} s", "soft", "end"))
    return "".join(parts), base + 24


def _legend(x: float, y: float, entries: Sequence[tuple[str, str]]) -> list[str]:
    parts = []
    for css, name in entries:
        parts.append(f'<rect class="{css}" x="{x}" y="{y}" width="11" height="11" rx="2"/>')
        parts.append(_text(x + 17, y + 10, name, "soft"))
        x += 40 + 7 * len(name)
    return parts


def _bar(x: float, y: float, width: float, height: float, css: str) -> str:
    return f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}"/>'


def _text(x: float, y: float, words: str, css: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{html.escape(words)}</text>'
