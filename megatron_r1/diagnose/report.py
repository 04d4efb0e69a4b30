"""The verdict in words, as a table by layer and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    side runs; `worst_logprob`: the largest. `hidden`: by layer, how far the hidden states behind it are apart as each
    side runs, as a module's difference. `fields`: numbers of config.json that differ, (vLLM's, the trainer's).
    `weights`: the Hugging Face tensors of the first module that departs; `unlike`: those of them that are not the same
    in the two folders (None: not looked at)."""

    modules: Sequence[Module]
    num_tokens: int
    dtype: str
    logprob_difference: float
    worst_logprob: float
    hidden: Sequence[float]
    fields: Mapping[str, tuple[Any, Any]]
    weights: Sequence[str] = ()
    unlike: Sequence[str] | None = None

    @property
    def departing(self) -> list[Module]:
        return [module for module in self.modules if module.departs]


def table(diagnosis: Diagnosis) -> str:
    """A line a layer: the difference that each module makes of the same input, then how far the hidden states behind
    the layer are apart when each side runs on its own (of other modules: their outputs)."""
    rows: dict[str, dict[str, Module]] = {}
    for module in diagnosis.modules:
        layer = split_part(module.name)
        row, column = (module.name, OUTPUT) if layer is None else (f"layer {layer[0]}", layer[1])
        rows.setdefault(row, {})[column] = module
    present = [part for part in COLUMNS if any(part in row for row in rows.values())]
    lines = [f"{'':20s}" + "".join(f"{COLUMNS[part]:>11s}" for part in present) + f"{'drift':>11s}"]
    for name, row in rows.items():
        cells = "".join(f"{_cell(row[part]) if part in row else '':>11s}" for part in present)
        layer = split_part(next(iter(row.values())).name)
        drift = row[OUTPUT].drift if layer is None else diagnosis.hidden[layer[0]]
        lines.append(f"{name:20s}{cells}{_number(drift):>11s}")
    return "\n".join(lines)


def _cell(module: Module) -> str:
    part = split_part(module.name)
    share = part is not None and part[1] == EXPERTS and module.difference is not None
    text = f"{module.difference:.1%}" if share else _number(module.difference)
    return f"{text} *" if module.departs else f"{text}  "


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def verdict(diagnosis: Diagnosis) -> str:
    """Who departs first, and below it what is known of that module; or how well the two agree."""
    departing = diagnosis.departing
    if not departing:
        worst = max(diagnosis.modules, key=lambda each: each.difference / each.bound if each.difference else 0.0)
        said = [
            f"vLLM and Megatron agree in every module: the largest difference is {_number(worst.difference)}, of "
            f"{worst.name} (bound {worst.bound:.1e}, {diagnosis.dtype})"
        ]
    else:
        said = [_departure(departing[0]), *_about(diagnosis, departing)]
    for module in (each for each in diagnosis.modules if each.stands_out):
        said.append(
            f"below the bound, but not as in other layers: {module.name} differs by {_number(module.difference)}, "
            f"usual is {_number(module.usual)}"
        )
    if diagnosis.fields:
        pairs = (f"{name} ({one} for vLLM, {two} for Megatron)" for name, (one, two) in diagnosis.fields.items())
        said.append(f"config.json differs in {', '.join(pairs)}")
    said.append(
        f"mean |logprob difference| of the {diagnosis.num_tokens - 1} tokens is {diagnosis.logprob_difference:.2g}, "
        f"the largest {diagnosis.worst_logprob:.2g}"
    )
    return "\n  ".join(said)


def _departure(module: Module) -> str:
    part = split_part(module.name)
    start = f"the first module that departs is {module.name}: "
    if part is not None and part[1] == EXPERTS:
        return (
            f"{start}of the same router logits {module.difference:.1%} of the tokens get other experts (bound "
            f"{module.bound:.1%})"
        )
    of = "logits differ" if module.name == HEAD else "output differs"
    return (
        f"{start}from the same input its {of} by {_number(module.difference)} at token {module.position} (bound "
        f"{module.bound:.1e})"
    )


def _about(diagnosis: Diagnosis, departing: Sequence[Module]) -> Iterator[str]:
    if experts := departing[0].experts:
        names = " or ".join(map(str, experts))
        yield f"every token that departs there has expert {names}, and no other token has"
    if diagnosis.weights:
        yield f"its weights: {_listed(grouped(diagnosis.weights))}"
    if diagnosis.unlike:
        yield f"not the same in the two folders: {_listed(grouped(diagnosis.unlike))}"
    elif diagnosis.unlike is not None:
        yield "these are the same in the two folders"
    if len(departing) > 1:
        yield f"{len(departing)} modules depart: {_listed(grouped([each.name for each in departing]))}"


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[:SHOWN_NAMES])
    return shown + (f" and {len(items) - SHOWN_NAMES} more" if len(items) > SHOWN_NAMES else "")


def grouped(names: Sequence[str]) -> list[str]:
    """Names that differ in one number alone, joined: model.layers.0-3.self_attn."""
    alike: dict[str, list[list[int]]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append([int(number) for number in re.findall(r"\d+", name)])
    found: list[str] = []
    for key, rows in alike.items():
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
        "verdict": verdict(diagnosis),
        "tokens": diagnosis.num_tokens,
        "dtype": diagnosis.dtype,
        "logprob_difference": {"mean": diagnosis.logprob_difference, "largest": diagnosis.worst_logprob},
        "hidden_differences": diagnosis.hidden,
        "config_differences": {name: {"vllm": a, "megatron": b} for name, (a, b) in diagnosis.fields.items()},
        "unlike_tensors": diagnosis.unlike,
        "modules": [
            {
                "name": module.name,
                "difference": module.difference,
                "bound": module.bound,
                "departs": module.departs,
                "usual": module.usual,
                "stands_out": module.stands_out,
                "token": module.position,
                "drift": module.drift,
                "experts": module.experts,
                "weights": weights_behind(module, diagnosis.modules, hf_names) if module.departs else None,
            }
            for module in diagnosis.modules
        ],
    }
