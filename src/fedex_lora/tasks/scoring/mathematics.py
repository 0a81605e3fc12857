r"""Answers to mathematical questions: taken out of a text, and compared.

Two comparisons. *The same*: equal after the clean-up of notation (`normal_form`) that is usual since Hendrycks et al. 2021.
*Equivalent*: the same, or the same value by the package `math-verify` (`x+1` and `1+x`, `\frac{\sqrt3}{3}` and `1/\sqrt{3}`). By itself
that package takes 11 in base 2 for 11 in base 3, and `x` for `X`, and reads no mixed numbers.
"""

import logging
import re
import threading
from fractions import Fraction
from functools import cache
from typing import Any

from fedex_lora.errors import require_extra

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<whole>\d+) (?=\d+/\d))?(?P<above>(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d{1,3}(?!\d))?)"
    r"(?:\s*/\s*(?P<below>\d+(?:\.\d+)?))?"
)
_WRITTEN = tuple(  # how numbers are written, to how they are read
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\u2212\u2013]", "-"),
        (r"[\u00a0\u2009\u202f]", " "),
        (r"\{,\}", ","),
        (r"\\[dtc]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", r" \1\2/\3\4"),
        (r"[\\$£€]|(?<=[-+])\s", ""),
        (r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d/])", lambda found: found[0].replace(" ", "")),
        (r"\s+", " "),
    )
)


def extract_number(text: str) -> Fraction | None:
    """The number after the last "The answer is" or `####`; None where there is none.

    >>> extract_number("16 - 7 = 9 eggs, so 9 * 2 = 18. The answer is: $18.00.")
    Fraction(18, 1)
    >>> extract_number("The answer is: 2 1/2")
    Fraction(5, 2)
    >>> extract_number("She makes 9 * 2 dollars.")
    """
    answer = _after_last(text, r"The answer is:?", r"####")
    if answer is None:
        return None
    for pattern, replacement in _WRITTEN:
        answer = pattern.sub(replacement, answer)
    found = _NUMBER.search(answer)
    if not found or (found["below"] and not Fraction(found["below"])):
        return None
    try:
        value = Fraction(found["whole"] or 0) + Fraction(found["above"].replace(",", "")) / Fraction(found["below"] or 1)
    except ValueError:  # more digits than Python reads
        return None
    return -value if found["sign"] == "-" else value


def extract_answer(text: str) -> str | None:
    r"""What stands after the last "The answer is" (to the end of its sentence), else in the last `\boxed{}`; None where there is neither.

    >>> extract_answer(r"Then $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> extract_answer(r"The answer is: 3 \text{ cm}.")
    '3 \\text{ cm}'
    """
    stated = _after_last(text, r"The answer is:?")
    if stated is not None:
        if re.match(r"[\s$]*\\(?:boxed|fbox)", stated):
            return last_boxed(stated)
        stated = re.split(r"\.?\n|\.\s*$|\.\s+(?=[A-Z])", stated.strip(), maxsplit=1)[0].strip()
        return last_boxed(stated) or _flat(stated) or last_boxed(text)
    return last_boxed(text)


def _after_last(text: str, *marks: str) -> str | None:
    found = list(re.finditer("|".join(marks), text))
    return text[found[-1].end() :] if found else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` (or of `\boxed 3`)."""
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*", text))
    if not found:
        return None
    rest = text[found[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0] or None
    depth = 0
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0) if rest[position - 1 : position] != "\\" else 0
        if depth == 0:
            return _flat(rest[1:position])
    return None


def _flat(text: str) -> str | None:
    return " ".join(text.split()) or None


_UNITS = (
    r"(?:dollars?|cents?|inch(?:es)?|f(?:ee|oo)t|yards?|miles?|(?:centi|milli|kilo)?met(?:er|re)s?|(?:kilo)?grams?|pounds?|lit(?:er|re)s?"
    r"|units?|degrees?|radians?|percent|seconds?|minutes?|hours?|days?|weeks?|months?|years?|square|cubic|per|(?:cm|mm|km|sq|ft|mph))"
)
_CLEAN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^\$+|\$+$|\\\(|\\\)|^\\\[|\\\]$", ""),
        (r"(?<=[%$°]),\s*|(?<=circ),\s*|(?<=circ\}),\s*|,\s*(?=\\?\$)", r",\\ "),  # a list, and no thousands' comma
        (r"\\\$|\\%|%|\$", ""),
        (r"\{,\}\s*|,?\\!\s*,?", ","),  # 10{,}000 and 10,\!000
        (r"\\(?:left|right|displaystyle|mathstrut|limits|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?|°", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(le|ge|ne)(?:q|qslant)(?![a-z])", r"\\\1"),
        (r"(?<=[\d}])\s*\\(?:text|mbox|mathrm|textrm)\s*\{\s*[^{}()]*\}(?:\^\{?\d\}?)?\s*$", ""),  # a unit after a value
        (r"\\(?:text|mbox|mathrm|textbf|textrm|textit|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (rf"(?<=\d)\s+{_UNITS}(?:\s+{_UNITS})*\s*$", ""),  # 5 dollars, 12 square inches
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"^([-+]?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),  # 3 1/2
        (r"^\d+(?:\s+\d+)+$", lambda found: ",".join(found[0].split())),  # 10 000, and lists
        (r"(?:^|(?<=[=\s]))[-+]?\d{1,3}(?:,\d{3})+(?=(?:\.\d+)?\s*$)", lambda found: found[0].replace(",", "")),  # 10,000
        (r"(?<!\\)\\[,;: ]|~|\\quad|\s+", ""),
        (r"\\sqrt(\w)", r"\\sqrt{\1}"),
        (r"\\frac(\d)\{", r"\\frac{\1}{"),
        (r"\\frac\{([^{}]*)\}(\w)", r"\\frac{\1}{\2}"),
        (r"^([-+]?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"([_^])\{(\w)\}", r"\1\2"),
        (r"^\w(?:_\w)?=(?=[^=]+$)|^\w(?:_\w)?\\in(?![a-z])", ""),  # x = 5, x in [0, 1]
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"\.$", ""),
    )
)


def normal_form(answer: str) -> str:
    r"""An answer without what is only notation: delimiters, spacing, sizes, units, degree and percent signs, `x =`, thousands' commas.

    >>> normal_form(r"$x = \dfrac{1}{2}\text{ cm}$")
    '\\frac{1}{2}'
    """
    text = answer.strip()
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text


def equivalent(gold: str, answer: str) -> bool:
    r"""Do two answers say the same, whatever the notation?

    A decimal is not its rounding (`0.33` is not `1/3`), order counts in pairs and not in sets, an open end is not a closed one, and a base
    or a word must be the same.

    Raises:
        UsageError: no `math-verify`.

    Example:
        >>> equivalent(r"\frac{\sqrt{3}}{3}", r"$1/\sqrt 3$"), equivalent("(1, 2)", "(2, 1)")
        (True, False)
    """
    ours, theirs = normal_form(gold), normal_form(answer)
    if ours.lower() == theirs.lower():
        return _spelled(ours) == _spelled(theirs)
    word, base = re.compile(r"[A-Za-z]{3,}"), re.compile(r"\d_\{?\d")
    if word.fullmatch(ours) or word.fullmatch(theirs) or base.search(ours) or base.search(theirs):
        return False
    return _same_value(*(_REPEATING.sub(_fraction, _EXPONENT.sub(r"\1\\cdot10^{\2}", text)).replace(",", ", ") for text in (ours, theirs)))


def _spelled(text: str) -> str:
    """Even is even and (A) is (a), but x is not X."""
    return re.sub(r"(?<![\\A-Za-z])(?:[A-Z]?[a-z]{2,}|[A-Z]{4,})(?![A-Za-z])|^\([A-Z]\)$", lambda found: found[0].lower(), text)


_EXPONENT = re.compile(r"^([-+]?\d*\.?\d+)[eE]([-+]?\d{1,2})$")
_REPEATING = re.compile(r"^([-+]?)(\d*)\.(\d*)\\overline\{?(\d+)\}?$")


def _fraction(found: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as `\frac{15}{90}`."""
    sign, whole, first, again = found.groups()
    return rf"{sign}\frac{{{int(whole + first + again) - int(whole + first or 0)}}}{{{10 ** len(first) * (10 ** len(again) - 1)}}}"


@cache
def _same_value(gold: str, answer: str) -> bool:
    require_extra("math_verify", "math", "equivalent answers")
    from math_verify import LatexExtractionConfig, parse, verify

    seconds: Any = 5 if threading.current_thread() is threading.main_thread() else None  # its alarm works in the main thread only
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel("CRITICAL")
    ours, theirs = (parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=seconds, raise_on_error=False) for text in (gold, answer))
    return bool(ours and theirs and verify(ours, theirs, float_rounding=12, timeout_seconds=seconds, raise_on_error=False))
