"""The five official metrics of the E2E NLG challenge, of predictions made anywhere.

BLEU and NIST as `mteval-v13a.pl` computes them (`mteval`); METEOR, ROUGE-L and CIDEr by the package `pycocoevalcap`, on tokens of the
Stanford tokenizer. The package's jars need Java.
"""

import csv
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedex_lora.errors import DataError, FedexLoraError, UsageError
from fedex_lora.tasks.scoring.mteval import bleu, nist, tokenize

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
_BY_SCRIPT = {"BLEU": bleu, "NIST": nist}


def require_e2e(metrics: Sequence[str] = METRICS) -> None:
    """These metrics can be computed here.

    Raises:
        UsageError: an unknown metric; no `pycocoevalcap`, or no Java.
    """
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"unknown metric {name!r}: give some of {','.join(METRICS)}")
    if set(metrics) <= set(_BY_SCRIPT):
        return
    if find_spec("pycocoevalcap") is None:
        raise UsageError("METEOR, ROUGE_L and CIDEr need pycocoevalcap: pip install '.[e2e]', or ask for --metrics BLEU,NIST")
    if shutil.which("java") is None:
        raise UsageError(
            "METEOR, ROUGE_L and CIDEr need Java, and there is no command `java`: install a Java runtime, or ask for --metrics BLEU,NIST"
        )


def score_e2e(predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """The metrics of what a system said, over the corpus.

    Args:
        predictions: one text a meaning representation; line breaks in it count as spaces.
        references: of each, what people said, at least one.
        metrics: some of `METRICS`.

    Raises:
        UsageError: see `require_e2e`.

    Example:
        >>> scores = score_e2e(["Aromi is a pub in the city centre."], [["Aromi is a pub in the city centre."]], ["BLEU"])
        >>> scores
        {'BLEU': 1.0}
    """
    require_e2e(metrics)
    said = [_one_line(text) for text in predictions]
    people = [[_one_line(text) for text in texts] for texts in references]
    segments = [(tokenize(text), [tokenize(one) for one in texts]) for text, texts in zip(said, people, strict=True)]
    scores = {name: function(segments) for name, function in _BY_SCRIPT.items() if name in metrics}
    if set(metrics) - set(_BY_SCRIPT):
        scores |= _by_coco(said, people, metrics)
    return {name: scores[name] for name in METRICS if name in metrics}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _by_coco(predictions: list[str], references: list[list[str]], metrics: Sequence[str]) -> dict[str, float]:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    said = {number: [line] for number, line in enumerate(_stanford_tokens(predictions))}
    lines = iter(_stanford_tokens([one for texts in references for one in texts]))
    people = {number: [next(lines) for _ in texts] for number, texts in enumerate(references)}
    scorers = {"METEOR": Meteor, "ROUGE_L": Rouge, "CIDEr": Cider}
    try:
        return {name: float(scorer().compute_score(people, said)[0]) for name, scorer in scorers.items() if name in metrics}
    except (OSError, ValueError) as error:
        raise FedexLoraError(f"METEOR's Java process failed: does `java -version` work here, with 2 GB to spare? ({error})") from None


def _stanford_tokens(lines: list[str]) -> list[str]:
    """Each line in lower case as tokens of the Penn treebank, without punctuation, as `pycocoevalcap` has it (whose own call needs to write
    into the installed package)."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    done = subprocess.run(command, input="\n".join([*lines, ""]).encode(), capture_output=True, check=False)
    tokens = done.stdout.decode().split("\n")[: len(lines)]
    if done.returncode or len(tokens) != len(lines):
        said = (done.stderr.decode(errors="replace").strip().splitlines() or ["nothing said"])[-1]
        raise FedexLoraError(f"the Stanford tokenizer failed: does `java -version` work here? ({said})")
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in tokens]


def read_references(path: Path) -> dict[str, list[str]]:
    """Meaning representation -> what people said, from a CSV file with columns `mr` and `ref`; in the order in which they first come.

    Raises:
        DataError: the file or a column is missing, or a row has no text.
    """
    found: dict[str, list[str]] = {}
    for number, (mr, text) in _read(path, ",", ("mr", "ref")):
        if not text.strip():
            raise DataError(f"{path}: row {number} has no ref: fill it in or leave the row out")
        found.setdefault(mr, []).append(text)
    if not found:
        raise DataError(f"{path} has no rows: give the challenge's testset_w_refs.csv, or a CSV file like it")
    return found


def read_predictions(path: Path, references: Mapping[str, Any]) -> list[str]:
    """The text for each meaning representation of the references, in their order, from a TSV file with columns `MR` and `output`.

    An empty output is a prediction. Line breaks within a quoted output are kept, and count as spaces when it is scored.

    Raises:
        DataError: the file or a column is missing; a meaning representation is missing, there twice, or not among the references.
    """
    found: dict[str, str] = {}
    for number, (mr, text) in _read(path, "\t", ("mr", "output")):
        if mr in found:
            raise DataError(f"{path}: row {number} is a second prediction for {_short(mr)}: leave one of them")
        if mr not in references:
            raise DataError(f"{path}: row {number} is for {_short(mr)}, which has no reference: give the references of the same split")
        found[mr] = text
    missing = [mr for mr in references if mr not in found]
    if missing:
        raise DataError(
            f"{path} has no prediction for {len(missing)} of {len(references)} meaning representations, such as "
            f"{_short(missing[0])}: add them"
        )
    return [found[mr] for mr in references]


def _read(path: Path, separator: str, columns: tuple[str, str]) -> list[tuple[int, tuple[str, str]]]:
    """(row number, the two columns) of each row; the header is matched in lower case."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, delimiter=separator, strict=True))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give a file with the columns {' and '.join(columns)}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}: save it as UTF-8, with quotes around texts that hold quotes or breaks") from None
    header = [name.strip().lower() for name in rows[0]] if rows else []
    for column in columns:
        if column not in header:
            raise DataError(f"{path} has no column {column!r}: it has {', '.join(header) or 'no header'}")
    places = [header.index(column) for column in columns]
    body = [(number, row) for number, row in enumerate(rows[1:], start=1) if row]
    for number, row in body:
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} fields, and the header {len(header)}: quote texts with separators")
    return [(number, (row[places[0]], row[places[1]])) for number, row in body]


def _short(mr: str) -> str:
    return repr(mr if len(mr) <= 60 else mr[:57] + "...")
