"""How far a package is from the reference: norms a stage, greedy answers, and both as a table or as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np


@dataclass
class Difference:
    """The largest difference of a stage over all samples; both norms are relative to the reference."""

    stage: str
    tolerance: float | None
    max_rel: float = 0.0
    l2_rel: float = 0.0

    def add(self, found: np.ndarray, expected: np.ndarray) -> None:
        """Takes in one sample; arrays of different shapes, or with a number that is none, are infinitely apart."""
        if found.shape != expected.shape or not np.isfinite(found).all():
            self.max_rel = self.l2_rel = float("inf")
            return
        apart = found.astype(np.float64) - expected
        self.max_rel = max(self.max_rel, float(np.abs(apart).max() / max(np.abs(expected).max(), 1e-30)))
        size = float(np.linalg.norm(expected.astype(np.float64)))
        self.l2_rel = max(self.l2_rel, float(np.linalg.norm(apart)) / max(size, 1e-30))

    @property
    def ok(self) -> bool:
        """Whether both norms are within the tolerance; always when none is stated."""
        return self.tolerance is None or max(self.max_rel, self.l2_rel) <= self.tolerance


@dataclass
class Answers:
    """Greedy ids of a variant beside those of the reference that was fed the same ids."""

    against: str
    must_be_equal: bool
    answers: int = 0
    equal: int = 0
    tokens: int = 0
    equal_tokens: int = 0
    first: str | None = None

    def add(self, sample: str, found: np.ndarray, expected: list[int], logits: np.ndarray) -> None:
        """Takes in one answer; `found` are the ids after the same prefixes, so all equal means one same answer."""
        same = found == np.array(expected)
        self.answers += 1
        self.equal += bool(same.all())
        self.tokens += len(expected)
        self.equal_tokens += int(same.sum())
        if self.first is None and not same.all():
            at = int(np.argmin(same))
            gap = float(logits[at, expected[at]] - logits[at, found[at]])
            self.first = (
                f"{sample}: token {at} is {int(found[at])}, the reference has {expected[at]} ahead by {gap:.2g}"
            )

    @property
    def ok(self) -> bool:
        return not self.must_be_equal or self.equal == self.answers


@dataclass
class Report:
    """What one variant gave."""

    variant: str
    differences: list[Difference] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(part.ok for part in [*self.differences, *self.answers])


def as_json(reports: list[Report]) -> dict:
    """The reports as one JSON value; the two norms are max|a-b| / max|b| and |a-b| / |b| (Euclidean)."""
    return {
        "ok": all(report.ok for report in reports),
        "norms": {"max_rel": "max|a-b| / max|b|", "l2_rel": "||a-b||2 / ||b||2"},
        "variants": {
            report.variant: {
                "ok": report.ok,
                "stages": [asdict(part) | {"ok": part.ok} for part in report.differences],
                "greedy": [asdict(part) | {"ok": part.ok} for part in report.answers],
            }
            for report in reports
        },
    }


def as_text(reports: list[Report], cases: int, tokens: int) -> str:
    """The reports as a table for a person."""
    lines = [f"{cases} samples, {tokens} tokens each; relative to the reference b: max|a-b| / max|b|, |a-b| / |b|"]
    for report in reports:
        lines += ["", f"{report.variant:<34}{'max':>10}{'2-norm':>10}{'tolerance':>11}"]
        for part in report.differences:
            limit = "-" if part.tolerance is None else f"{part.tolerance:.0e}"
            verdict = "" if part.ok else "  exceeded"
            lines.append(f"  {part.stage:<32}{part.max_rel:>10.1e}{part.l2_rel:>10.1e}{limit:>11}{verdict}")
        for part in report.answers:
            verdict = "" if part.ok else "  all must be"
            lines.append(
                f"  greedy against {part.against}: {part.equal} of {part.answers} answers equal, "
                f"{part.equal_tokens} of {part.tokens} tokens{verdict}"
            )
            if part.first:
                lines.append(f"    {part.first}")
    return "\n".join(lines)
