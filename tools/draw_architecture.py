"""Draw docs/images/architecture.svg: what flows where in a run, each box with the code that does it.

    python tools/draw_architecture.py            draws it
    python tools/draw_architecture.py --check    status 1 if the file is not what would be drawn

A box names a file or folder of the package; one that is not there (it was renamed, say) is an error. The kinds of stage
and the algorithms are those of the code's own tables.
"""

from __future__ import annotations

import argparse
import html
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.algorithms import ALGORITHMS
from megatron_r1.pipeline.kinds import KINDS

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "images" / "architecture.svg"
WIDTH, HEIGHT = 1100, 624
STAGES = "pipeline/: stages in order, each a folder of stages/ or toy/ with config, object and run"
STEP = "one step of GRPO, stages/grpo/loop.py: the same program on every trainer rank"
RANK_0 = "rank 0 samples and grades; the others wait, and take part in a restarted server's push"
PLANNING = "planning/: memory, time and traffic of all this before it runs, from the same table and configuration"
CLUSTER = "cluster/: which node does what under Slurm; on one machine pipeline/launch.py starts one process per rank"
STYLE = """
text{font:13px system-ui,sans-serif;fill:#14140f}.soft{fill:#55544e;font-size:12px}.code{font:11.5px ui-monospace,
monospace;fill:#55544e}.name{font-size:14px;font-weight:600}.head{font-size:13px;font-weight:600;fill:#55544e}
.page{fill:#f6f6f3}.field{fill:none;stroke:#b9b8b0;stroke-dasharray:4 4}.box{fill:#fff;stroke:#b9b8b0}
.rollout{stroke:#2a78d6;stroke-width:2}.trainer{stroke:#1baf7a;stroke-width:2}.sync{stroke:#e0a100;stroke-width:2}
.line{fill:none;stroke:#55544e;stroke-width:1.5;marker-end:url(#head)}#head path{fill:#55544e}
@media(prefers-color-scheme:dark){text{fill:#f4f4ef}.soft,.code,.head{fill:#c0bfb6}.page{fill:#111110}
.field{stroke:#4a4a44}.box{fill:#1b1b19;stroke:#4a4a44}.rollout{stroke:#2a78d6}.trainer{stroke:#1baf7a}
.sync{stroke:#e0a100}.line{stroke:#c0bfb6}#head path{fill:#c0bfb6}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """`code` is a path below megatron_r1/; `kind` gives its colour."""

    name: str
    code: str
    x: int
    y: int
    width: int = 180
    height: int = 62
    kind: str = ""
    says: str = ""

    def drawn(self) -> str:
        lines = [("name", self.name), ("code", self.code)] + ([("soft", self.says)] if self.says else [])
        middle = self.x + self.width / 2
        first = self.y + self.height / 2 - (len(lines) - 1) * 8.5 + 4
        texts = "".join(_text(middle, first + 17 * row, text, style) for row, (style, text) in enumerate(lines))
        return (
            f'<rect class="box {self.kind}" x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" '
            f'rx="8"/>{texts}'
        )


def boxes() -> list[Box]:
    top, low, last = 216, 340, 464
    algorithms = ", ".join(name for name in ALGORITHMS if name != "on_policy_distill")
    return [
        Box(name="problems", code="data/", x=40, y=top, says="files, tasks, your source"),
        Box(name="prompts", code="data/template.py", x=255, y=top),
        Box(name="engines", code="engines/", x=470, y=top, kind="rollout", says="vLLM servers"),
        Box(name="graders", code="rewards/", x=685, y=top, kind="rollout", says="killable workers"),
        Box(name="graded groups", code="rollout/", x=900, y=top, width=160, kind="rollout", says="and their journal"),
        Box(name="advantages", code="algorithms/", x=685, y=low, width=375, kind="trainer", says=algorithms),
        Box(name="own sequences", code="stages/grpo/shares.py", x=470, y=low, kind="trainer", says="scattered"),
        Box(name="packed rows", code="data/packing.py", x=255, y=low, kind="trainer"),
        Box(name="logprobs", code="policy/", x=40, y=low, kind="trainer", says="old, reference"),
        Box(name="optimizer step", code="policy/policy.py", x=40, y=last, kind="trainer", says="Megatron-Core"),
        Box(name="weight table", code="weights/table.py", x=255, y=last, kind="sync", says="Megatron and HF names"),
        Box(name="weight sync", code="engines/vllm/sync.py", x=470, y=last, kind="sync", says="a version per step"),
        Box(name="checkpoints", code="policy/checkpoint.py", x=685, y=last, says="any layout reads them"),
        Box(name="report, trackers", code="observe/", x=900, y=last, width=160, says="and metrics.jsonl"),
    ]


def arrows() -> list[tuple[float, ...]]:
    """Corners of each line, x and y in turn."""
    top, low, last = 247, 371, 495
    return [
        (220, top, 249, top), (435, top, 464, top), (650, top, 679, top), (865, top, 894, top),
        (980, 278, 980, 334),
        (685, low, 656, low), (470, low, 441, low), (255, low, 226, low),
        (130, 402, 130, 458),
        (220, last, 249, last), (435, last, 464, last),
        (512, 464, 512, 424, 455, 424, 455, 300, 512, 300, 512, 284),
    ]  # fmt: skip


def draw() -> str:
    """The whole document. FileNotFoundError for a box whose code is not there."""
    found = boxes()
    for box in found:
        if not (ROOT / "megatron_r1" / box.code).exists():
            raise FileNotFoundError(f"{box.name}: megatron_r1/{box.code} is not there; mend tools/draw_architecture.py")
    parts = [
        _text(40, 36, "A run of megatron_r1: what flows where, and the code that does it", "name", "start"),
        _text(40, 66, STAGES, "head", "start"),
    ]
    names = [kind.name for kind in KINDS]
    letter = (1020 - 12 * (len(names) - 1)) / sum(len(name) + 4 for name in names)
    x = 40.0
    for name in names:
        width = letter * (len(name) + 4)
        style = "box trainer" if name == "GRPO" else "box"
        parts.append(f'<rect class="{style}" x="{x:.1f}" y="80" width="{width:.1f}" height="40" rx="8"/>')
        parts.append(_text(x + width / 2, 105, name, "name"))
        if name == "GRPO":
            parts.append(f'<path class="line" d="M{x + width / 2:.1f} 120 L{x + width / 2:.1f} 146"/>')
        x += width + 12
    for place, (kind, means) in enumerate((("rollout", "sampling"), ("trainer", "training"), ("sync", "weights back"))):
        parts.append(f'<rect class="box {kind}" x="{776 + 96 * place}" y="574" width="11" height="11" rx="2"/>')
        parts.append(_text(792 + 96 * place, 584, means, "soft", "start"))
    parts += [
        '<rect class="field" x="20" y="152" width="1060" height="400" rx="12"/>',
        _text(40, 178, STEP, "head", "start"),
        _text(40, 198, RANK_0, "soft", "start"),
        *(box.drawn() for box in found),
        *(_line(corners) for corners in arrows()),
        _text(40, 584, PLANNING, "soft", "start"),
        _text(40, 604, CLUSTER, "soft", "start"),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img"><title>Architecture of megatron_r1</title><style>{STYLE}</style><defs><marker id="head" '
        'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z"/></marker></defs><rect class="page" width="{WIDTH}" height="{HEIGHT}"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _text(x: float, y: float, text: str, style: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(corners: tuple[float, ...]) -> str:
    points = [f"{x:g} {y:g}" for x, y in zip(corners[::2], corners[1::2], strict=True)]
    return f'<path class="line" d="M{" L".join(points)}"/>'


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="draw nothing; status 1 if the file is out of date")
    drawn = draw()
    if parser.parse_args().check:
        if TARGET.exists() and TARGET.read_text(encoding="utf-8") == drawn:
            return 0
        print("architecture.svg is not what the code says: python tools/draw_architecture.py", file=sys.stderr)
        return 1
    TARGET.write_text(drawn, encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)} drawn")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
