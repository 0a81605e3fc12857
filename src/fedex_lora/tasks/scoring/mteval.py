"""BLEU and NIST as NIST's `mteval-v13a.pl` computes them, with several references a segment, case-insensitive.

BLEU: Papineni et al. 2002, up to 4-grams, unsmoothed, effective reference length. NIST: Doddington 2002, up to 5-grams. Python ports of
the script differ from it in details that show in the third decimal; this one gives the script's four decimals (docs/evaluation.md).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

Tokens: TypeAlias = tuple[str, ...]
Segments: TypeAlias = Sequence[tuple[Tokens, Sequence[Tokens]]]
"""(what the system said, what people said) of each segment."""

BLEU_ORDER, NIST_ORDER = 4, 5
NIST_BETA = math.log(0.5) / math.log(1.5) ** 2  # two thirds of the references' length halve the score

_MARKUP = (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_MARKS = re.compile(r"([{-~\[-` -&(-+:-@/])")  # ASCII punctuation but ' , - .
_POINT_AFTER_WORD = re.compile(r"([^0-9])([.,])")
_POINT_BEFORE_WORD = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")


def tokenize(text: str) -> Tokens:
    """The tokens that the script compares: lower case, ASCII punctuation apart, numbers whole.

    >>> tokenize("It's £20.50, in the U.K.")
    ("it's", '£20.50', ',', 'in', 'the', 'u', '.', 'k', '.')
    """
    for markup, meant in _MARKUP:
        text = text.replace(markup, meant)
    text = f" {text.lower()} "
    text = _MARKS.sub(r" \1 ", text)
    text = _POINT_AFTER_WORD.sub(r"\1 \2 ", text)
    text = _POINT_BEFORE_WORD.sub(r" \1 \2", text)
    text = _DASH_AFTER_DIGIT.sub(r"\1 \2 ", text)
    return tuple(text.split())


def bleu(segments: Segments) -> float:
    """`exp(min(0, 1 - r/c)) * (p_1 p_2 p_3 p_4)^(1/4)` over the corpus, r the reference lengths that are closest to the system's.

    >>> cat = tokenize("the cat is on the mat")
    >>> bleu([(cat, [cat])])
    1.0
    """
    matched, possible = [0] * BLEU_ORDER, [0] * BLEU_ORDER
    length, reference_length = 0, 0
    for said, references in segments:
        length += len(said)
        reference_length += min((abs(len(one) - len(said)), len(one)) for one in references)[1]
        most = _most(references, BLEU_ORDER)
        for gram, count in _grams(said, BLEU_ORDER).items():
            matched[len(gram) - 1] += min(count, most[gram])
            possible[len(gram) - 1] += count
    if not all(matched):
        return 0.0
    precision = math.fsum(math.log(hits / all_) for hits, all_ in zip(matched, possible, strict=True)) / BLEU_ORDER
    return math.exp(min(0.0, 1 - reference_length / length) + precision)


def nist(segments: Segments) -> float:
    """`exp(beta log^2 min(1, c/r)) * sum_n (information of the n-grams that match) / (n-grams said)`.

    c is the length of what the system said; r the mean length of all references of the corpus, times the number of segments (ports take the
    mean within each segment first). The information of an n-gram is `log2(count of its first n-1 words / count of it)` in all references.
    """
    everything = [one for _, references in segments for one in references]
    counts, words = Counter[Tokens](), sum(map(len, everything))
    for one in everything:
        counts.update(_grams(one, NIST_ORDER))
    gained, possible, length = [0.0] * NIST_ORDER, [0] * NIST_ORDER, 0
    for said, references in segments:
        length += len(said)
        most = _most(references, NIST_ORDER)
        for gram, count in _grams(said, NIST_ORDER).items():
            possible[len(gram) - 1] += count
            if gram in most:
                before = counts[gram[:-1]] if len(gram) > 1 else words
                gained[len(gram) - 1] += min(count, most[gram]) * math.log2(before / counts[gram])
    if not length or not words:
        return 0.0
    reference_length = len(segments) * words / len(everything)
    penalty = math.exp(NIST_BETA * math.log(min(1.0, length / reference_length)) ** 2)
    return penalty * math.fsum(information / max(1, said_) for information, said_ in zip(gained, possible, strict=True))


def _grams(tokens: Tokens, order: int) -> Counter[Tokens]:
    """How often each n-gram occurs, n = 1..order."""
    return Counter(tokens[start : start + n] for n in range(1, order + 1) for start in range(len(tokens) - n + 1))


def _most(references: Sequence[Tokens], order: int) -> Counter[Tokens]:
    """Of each n-gram, the most that one reference has."""
    most = Counter[Tokens]()
    for one in references:
        most |= _grams(one, order)
    return most
