"""How much of what was sampled is kept, and where the rest went: by domain, and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_r1.stages.rejection.select import REASONS, Decision


class Yield:
    """Counts of decisions: `by_domain` says, of each domain, how many samples were kept or dropped for each reason."""

    def __init__(self) -> None:
        self.by_domain: dict[str, Counter[str]] = {}
        self._problems: dict[str, tuple[str, bool]] = {}

    def add(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            problem = decision.sample.problem
            self.by_domain.setdefault(problem.domain, Counter())[decision.reason or "kept"] += 1
            had = self._problems.get(problem.id, ("", False))[1]
            self._problems[problem.id] = (problem.domain, had or decision.reason is None)

    @property
    def kept(self) -> int:
        return sum(counts["kept"] for counts in self.by_domain.values())

    def as_json(self) -> dict[str, Any]:
        """{"all": counts, "by_domain": {domain: counts}}; counts are problems, problems_kept (with a kept sample),
        samples, kept, and dropped by reason."""
        return {
            "all": self._counts(None),
            "by_domain": {domain: self._counts(domain) for domain in sorted(self.by_domain)},
        }

    def _counts(self, domain: str | None) -> dict[str, Any]:
        counts = sum((c for name, c in self.by_domain.items() if domain in (None, name)), Counter[str]())
        kept = [kept for name, kept in self._problems.values() if domain in (None, name)]
        return {
            "problems": len(kept),
            "problems_kept": sum(kept),
            "samples": counts.total(),
            "kept": counts["kept"],
            "dropped": {reason: counts[reason] for reason in REASONS if counts[reason]},
        }


def describe_yield(report: Mapping[str, Any]) -> str:
    """yield.json as a small table."""
    problems, everything = report["problems"], report["yield"]["all"]
    left_out = [f"{problems[name]} {what}" for name, what in LEFT_OUT.items() if problems[name]]
    lines = [f"problems: {problems['given']} given" + "".join(f", {text}" for text in left_out)]
    lines.append(f"{'samples':16s}{everything['samples']:9,d}")
    lines.append(_line("kept", everything["kept"], everything, f"of {everything['problems_kept']:,} problems"))
    lines += [_line(reason, number, everything, REASONS[reason]) for reason, number in everything["dropped"].items()]
    domains = report["yield"]["by_domain"]
    if len(domains) > 1:
        lines += [_line(f"kept {name}", counts["kept"], counts, "") for name, counts in domains.items()]
    for file, overlap in report["contamination"].items():
        lines.append(f"{file}: {overlap['evaluation_problems']} of its problems overlap {overlap['problems']} given")
    for source in report["mix"]:
        short = "" if source["written"] == source["wanted"] else f", of {source['wanted']:,} that the weights ask for"
        lines.append(f"mixed in: {source['written']:,} from {source['file']}{short}")
    return "\n".join(lines)


LEFT_OUT = {
    "contaminated": "overlap an evaluation problem",
    "repeated": "repeat an earlier question",
    "no_room": "leave no room for an answer",
}


def _line(name: str, number: int, counts: Mapping[str, Any], meaning: str) -> str:
    return f"{name:16s}{number:9,d}{number / max(counts['samples'], 1):8.1%}   {meaning}".rstrip()
