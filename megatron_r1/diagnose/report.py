"""The verdict in words, as a table by layer and as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from megatron_r1.activations import EXPERTS, HEAD, PARTS, split_part
from megatron_r1.diagnose.verdict import Module, weights_behind

SHOWN_NAMES = 8
OUTPUT = "output"
COLUMNS: dict[str, str] = dict(zip(PARTS, ("norm", "attention", "norm", "router", "experts", "mlp"), strict=True))
COLUMNS[OUTPUT] = OUTPUT
"""Of embedding, last norm and head: they are rows of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found. `logprob_difference`: mean |logprob(vLLM) - logprob(Megatron)| over the prompt's tokens, as each
    side runs; `worst_logprob`: the largest. `fields`: numbers of config.json that differ, (vLLM's, the trainer's).
    `weights`: the Hugging Face tensors of the first module that departs; `unlike`: those of them that are not the same
    in the two folders (None: not looked at)."""

    modules: Sequence[Module]
    num_tokens: int
    dtype: str
    logprob_difference: float
    worst_logprob: float
    fields: Mapping[str, tuple[Any, Any]]
    weights: Sequence[str] = ()
    unlike: Sequence[str] | None = None

    @property
    def departing(self) -> list[Module]:
        return [module for module in self.modules if module.departs]


def table(diagnosis: Diagnosis) -> str:
    """A line a layer: the difference that each module adds, then how far both sides are apart behind its layer."""
    rows: dict[str, dict[str, Module]] = {}
    for module in diagnosis.modules:
        layer = split_part(module.name)
        row, column = (module.name, OUTPUT) if layer is None else (f"layer {layer[0]}", layer[1])
        rows.setdefault(row, {})[column] = module
    present = [part for part in COLUMNS if any(part in row for row in rows.values())]
    lines = [f"{'':20s}" + "".join(f"{COLUMNS[part]:>11s}" for part in present) + f"{'drift':>11s}"]
    for name, row in rows.items():
        cells = "".join(f"{_cell(row[part]) if part in row else '':>11s}" for part in present)
        last = [module for part, module in row.items() if part != EXPERTS][-1]
        lines.append(f"{name:20s}{cells}{_number(last.drift):>11s}")
    return "\n".join(lines)


def _cell(module: Module) -> str:
    part = split_part(module.name)
    share = part is not None and part[1] == EXPERTS and module.difference is not None
    text = f"{module.difference:.1%}" if share else _number(module.difference)
    return f"{text} *" if module.departs else f"{text}  "


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def sentence(diagnosis: Diagnosis) -> str:
    """Who departs first, with its weights; or how well the two agree."""
    apart = (
        f"mean |logprob difference| of the {diagnosis.num_tokens - 1} tokens is {diagnosis.logprob_difference:.2g}, "
        f"the largest {diagnosis.worst_logprob:.2g}"
    )
    departing = diagnosis.departing
    if not departing:
        worst = max(diagnosis.modules, key=lambda each: each.difference / each.bound if each.difference else 0.0)
        return (
            f"vLLM and Megatron agree in every module: the largest difference is {_number(worst.difference)} "
            f"({worst.name}; bound {worst.bound:.1e}, {diagnosis.dtype}); {apart}"
        )
    first = departing[0]
    said = [f"the first module that departs is {first.name}: {_what(first)}"]
    if first.experts:
        said.append(f"only expert {_listed(first.experts)} explains that")
    if diagnosis.weights:
        said.append(f"its weights are {_listed(grouped(diagnosis.weights))}")
    if diagnosis.unlike is not None:
        unlike = f"{_listed(grouped(diagnosis.unlike))} differ" if diagnosis.unlike else "none of these differs"
        said.append(f"{unlike} between the two folders")
    if diagnosis.fields:
        pairs = (f"{name} ({one} for vLLM, {two} for Megatron)" for name, (one, two) in diagnosis.fields.items())
        said.append(f"config.json differs in {', '.join(pairs)}")
    if len(departing) > 1:
        said.append(f"{len(departing)} modules depart in all: {_listed(grouped([each.name for each in departing]))}")
    return "; ".join([*said, apart])


def _what(module: Module) -> str:
    part = split_part(module.name)
    if part is not None and part[1] == EXPERTS:
        return (
            f"of equal router logits {module.difference:.1%} of the tokens get other experts (bound {module.bound:.1%})"
        )
    of = "logits" if module.name == HEAD else "output"
    return (
        f"from the same input its {of} differ by {_number(module.difference)} at token {module.position} (bound "
        f"{module.bound:.1e})"
    )


def _listed(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:SHOWN_NAMES])
    return shown + (f" and {len(items) - SHOWN_NAMES} more" if len(items) > SHOWN_NAMES else "")


def grouped(names: Sequence[str]) -> list[str]:
    """Names that differ in one number alone, joined: model.layers.0-3.self_attn."""
    found: list[str] = []
    for key, members in groupby(names, key=lambda name: re.sub(r"\d+", "*", name)):
        rows = [[int(number) for number in re.findall(r"\d+", name)] for name in members]
        moving = [place for place in range(len(rows[0])) if len({row[place] for row in rows}) > 1]
        if len(moving) > 1:
            found += [_filled(key, [str(number) for number in row]) for row in rows]
            continue
        numbers = [str(number) for number in rows[0]]
        for place in moving:
            numbers[place] = _ranges([row[place] for row in rows])
        found.append(_filled(key, numbers))
    return found


def _filled(key: str, numbers: Sequence[str]) -> str:
    rest = iter(numbers)
    return re.sub(r"\*", lambda _: next(rest), key)


def _ranges(numbers: Sequence[int]) -> str:
    breaks = [0, *(place + 1 for place, (a, b) in enumerate(pairwise(numbers)) if b != a + 1), len(numbers)]
    runs = [numbers[start:stop] for start, stop in pairwise(breaks)]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def as_json(diagnosis: Diagnosis, hf_names: Sequence[str]) -> dict[str, Any]:
    """Everything, as plain JSON values."""
    return {
        "agree": not diagnosis.departing,
        "first": diagnosis.departing[0].name if diagnosis.departing else None,
        "sentence": sentence(diagnosis),
        "tokens": diagnosis.num_tokens,
        "dtype": diagnosis.dtype,
        "logprob_difference": {"mean": diagnosis.logprob_difference, "largest": diagnosis.worst_logprob},
        "config_differences": {name: {"vllm": a, "megatron": b} for name, (a, b) in diagnosis.fields.items()},
        "unlike_tensors": diagnosis.unlike,
        "modules": [
            {
                "name": module.name,
                "difference": module.difference,
                "bound": module.bound,
                "departs": module.departs,
                "token": module.position,
                "drift": module.drift,
                "experts": module.experts,
                "weights": weights_behind(module, diagnosis.modules, hf_names) if module.departs else None,
            }
            for module in diagnosis.modules
        ],
    }
