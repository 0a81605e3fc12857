"""The tables of comparisons and reproductions: a title, columns, rows of text, and notes; in Markdown and LaTeX."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

NOT_RUN = "not run"


@dataclass(frozen=True)
class TextTable:
    """A table of text; the first column are names.

    Example:
        >>> print(TextTable("Scores", ["Method", "CoLA"], [["FedIT", "60.8 ± 0.4"]]).markdown())
        Scores
        <BLANKLINE>
        | Method | CoLA       |
        |--------|------------|
        | FedIT  | 60.8 ± 0.4 |
        <BLANKLINE>
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """For documents, and aligned for terminals."""
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(line[place]) for line in lines if place < len(line)) for place in range(len(self.columns))]
        text = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=False))} |" for line in lines]
        text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([self.title, "", *text, "", *([" ".join(self.notes), ""] if self.notes else [])])

    def latex(self) -> str:
        """For papers; wants the package booktabs."""
        body = [" & ".join(map(_escaped, row)) + r" \\" for row in (self.columns, *self.rows)]
        shape = "l" + "r" * (len(self.columns) - 1)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(self.title)}}}", rf"\begin{{tabular}}{{{shape}}}"]
        lines += [r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\\[2pt]\parbox{{\linewidth}}{{\footnotesize {_escaped(' '.join(self.notes))}}}"] if self.notes else []
        return "\n".join([*lines, r"\end{table}", ""])


_SPECIAL = {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$"}


def _escaped(text: str) -> str:
    return re.sub(r"[&%$#_{}~^\\±−]", lambda match: _SPECIAL.get(match[0], "\\" + match[0]), text)


def plus_minus(value: float | None, spread: float | None, digits: int = 3, sign: str = "") -> str:
    """A mean and its spread; nothing where there is no mean."""
    return "" if value is None else f"{value:{sign}.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
