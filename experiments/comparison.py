"""Ours beside what was published, with the reason where they differ.

Knows numbers and tables. Does not know where they come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number.

    Attributes:
        ours: as it came out of this run.
        published: None where nothing was.
        tolerance: from which difference on `why` is said.
        why: a sentence, known before the run: what of the setting is known to differ.
    """

    of: str
    measure: str
    ours: float
    published: float | None
    tolerance: float = 0.0
    why: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.published is None else self.ours - self.published

    def row(self) -> dict[str, object]:
        """As summary.json has it."""
        reason = ""
        if self.difference is not None and abs(self.difference) > self.tolerance:
            reason = self.why
        return {
            "of": self.of,
            "measure": self.measure,
            "ours": self.ours,
            "published": self.published,
            "difference": self.difference,
            "why": reason,
        }


def print_comparisons(title: str, comparisons: Sequence[Comparison]) -> None:
    """The table, and below it each reason once."""
    table = Table(title=title, title_justify="left")
    for name in ("", "measure", "ours", "paper", "difference"):
        table.add_column(name, justify="left" if name in ("", "measure") else "right")
    reasons: dict[str, list[str]] = {}
    for comparison in comparisons:
        row = comparison.row()
        table.add_row(
            comparison.of,
            comparison.measure,
            *[_number(row[name]) for name in ("ours", "published")],
            _number(row["difference"], sign="+"),
        )
        if row["why"]:
            of = f"{comparison.of} {comparison.measure}"
            reasons.setdefault(str(row["why"]), []).append(of)
    console = Console()
    console.print(table)
    for reason, where in reasons.items():
        console.print(f"{', '.join(where)}: {reason}", highlight=False)


def _number(value: object, sign: str = "") -> str:
    return f"{value:{sign}.3g}" if isinstance(value, int | float) else ""
