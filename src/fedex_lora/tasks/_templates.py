"""Templates: `{column}` is a cell, `{{` and `}}` are braces, and `[[ ... ]]` is left out of a row in which a column in it is empty."""

import re
from collections.abc import Mapping
from typing import Any

from fedex_lora.errors import DataError

_SECTION = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_PART = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


def columns_of(template: str) -> list[str]:
    """The columns that a template names, in their order.

    Raises:
        DataError: a brace that neither opens nor closes a name.

    >>> columns_of("{question} [[({a hint})]] {{x}}")
    ['question', 'a hint']
    """
    found = list(_PART.finditer(template))
    if any(part[0] in ("{", "}") for part in found):
        raise DataError(f"template {template!r}: a brace is alone: write column names in braces, and {{{{ or }}}} for a brace")
    return [part[1] for part in found if part[1]]


def filled(template: str, row: Mapping[str, Any]) -> str:
    """The template's text for a row; an empty cell, or one that is not there, is no text.

    >>> filled("{q}[[ ({hint})]]", {"q": "How old?", "hint": ""}), filled("{q}[[ ({hint})]]", {"q": "How old?", "hint": "in years"})
    ('How old?', 'How old? (in years)')
    """

    def section(match: re.Match[str]) -> str:
        return match[1] if all(text_of(row.get(name)).strip() for name in columns_of(match[1])) else ""

    def part(match: re.Match[str]) -> str:
        return text_of(row.get(match[1])) if match[1] else match[0][0]

    return _PART.sub(part, _SECTION.sub(section, template))


def text_of(cell: Any) -> str:
    """A cell as text; no value is no text."""
    return "" if cell is None else str(cell)
