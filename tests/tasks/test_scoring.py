"""Metrics of generated texts: official scores of real systems, gold answers, hand-made pairs, and what is said of bad files."""

import json
import math
from collections import Counter
from fractions import Fraction

import pytest
from tests.official_scores import SYSTEMS, official, score
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.errors import DataError, UsageError
from fedex_lora.evaluation._classes import write_rows
from fedex_lora.tasks.scoring.choices import CHOICES, extract_choice
from fedex_lora.tasks.scoring.e2e import METRICS, read_predictions, read_references, score_e2e
from fedex_lora.tasks.scoring.mathematics import equivalent, extract_answer, extract_number
from fedex_lora.tasks.scoring.mteval import bleu, nist, tokenize


@pytest.mark.parametrize("system", SYSTEMS)
def test_bleu_and_nist_of_the_challenge_s_systems(system, data_folder):
    """The Perl script's four decimals, also where outputs are short (chen), on which ports differ."""
    want = official(data_folder)[system]
    assert score(data_folder, system, ("BLEU", "NIST")) == {name: want[name] for name in ("BLEU", "NIST")}


@pytest.mark.campaign
def test_all_five_in_one_command(data_folder, java):
    """METEOR takes most of a minute on a busy machine, so of one system here; `make metrics` compares all five of the four systems."""
    folder = data_folder / "e2e"
    arguments = ["score", "e2e", folder / "system_outputs" / "chen.tsv", "--references", folder / "testset_w_refs.csv", "--json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    scores = json.loads(result.stdout)
    assert {name: f"{scores[name]:.4f}" for name in METRICS} == official(data_folder)["chen"]
    assert (scores["texts"], scores["references"], scores["empty"]) == (630, 4693, 0)


def test_rouge_and_cider_of_two_rows(java):
    """Texts that equal their reference have the highest scores; an empty one is scored, as nothing."""
    same = ["the cat sat on the mat today", "a blue dog runs in the green park"]
    scores = score_e2e(same, [[text] for text in same], ["ROUGE_L", "CIDEr"])
    assert scores == pytest.approx({"ROUGE_L": 1.0, "CIDEr": 10.0})
    assert score_e2e([same[0], ""], [[text] for text in same], ["ROUGE_L", "CIDEr"]) == pytest.approx({"ROUGE_L": 0.5, "CIDEr": 5.0})


def test_bleu_and_nist_by_hand():
    """Two segments small enough for paper."""
    said, first, second = "the cat sat on a mat", "the cat sat on the mat", "a cat sat here"
    segments = [(tokenize(said), [tokenize(first), tokenize(second)])]
    precisions = [6 / 6, 3 / 5, 2 / 4, 1 / 3]  # of `the cat, cat sat, sat on, on a, a mat`: three; and so on
    assert bleu(segments) == pytest.approx(math.prod(precisions) ** 0.25)
    words = Counter(f"{first} {second}".split())
    unigrams = sum(math.log2(10 / words[word]) for word in said.split())
    bigrams = math.log2(words["the"] / 1) + math.log2(words["cat"] / 2) + math.log2(words["sat"] / 1)
    higher = math.log2(1 / 1) + math.log2(2 / 1) + math.log2(1 / 1)  # the cat sat, cat sat on (`cat sat` is twice there), the cat sat on
    assert nist(segments) == pytest.approx(unigrams / 6 + bigrams / 5 + higher / 4)  # 6 words said, 5 expected: no penalty
    assert bleu([(tokenize(""), [tokenize(first)])]) == nist([(tokenize(""), [tokenize(first)])]) == 0.0


def test_gold_answers_are_extracted(data_folder):
    """Every published answer of GSM8K and MATH goes through the extractor and equals itself: 100 %."""
    for split, count in (("train", 7473), ("test", 1319)):
        rows = [json.loads(line)["answer"] for line in (data_folder / "gsm8k" / f"{split}.jsonl").open()]
        right = [extract_number(text) == Fraction(text.rpartition("#### ")[2].strip().replace(",", "")) for text in rows]
        assert (len(right), sum(right)) == (count, count)
    solutions = [json.loads(line)["solution"] for line in (data_folder / "math" / "test.jsonl").open()]
    answers = [extract_answer(text) for text in solutions]
    assert len(answers) == 5000
    assert all(answer is not None and equivalent(answer, answer) for answer in answers)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is: 18", 18),
        ("The answer is 1,234,567.", 1234567),
        ("The answer is: $5.50", Fraction(11, 2)),
        ("The answer is: -3 degrees", -3),
        ("The answer is: 3/4 of it", Fraction(3, 4)),
        ("The answer is: 3. No: The answer is: 4.", 4),
        ("so\n#### 70,000", 70000),
        ("The answer is: \\$20", 20),
        ("The answer is: .5", Fraction(1, 2)),
        ("The answer is: 7 eggs, of 16", 7),
        ("The answer is: unknown", None),
        ("The answer is: " + "1" * 5000, None),
        (r"The answer is: \frac23", Fraction(2, 3)),
        ("The answer is: 1\u00a0000", 1000),
        ("The answer is: 4.5/2", Fraction(9, 4)),
        ("The answer is: 1/0.0", None),
        ("The answer is: \u22123", -3),
        (r"The answer is: -\frac{1}{2}", Fraction(-1, 2)),
        ("The answer is: -2 1/2", Fraction(-5, 2)),
        ("The answer is: 10 000 people", 10000),
        ("The answer is: 5{,}000", 5000),
        ("The answer is: 1e3", 1000),
        ("It is 18.", None),
        ("The answer is: 1/0", None),
        ("", None),
    ],
)
def test_numbers_in_texts(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1}, no, \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 3 is it", "3"),
        ("The answer is: 5.\nNext question", "5"),
        (r"The answer is: $\boxed{4}$.", "4"),
        (r"The answer is $\boxed{\text{St. Ives}}$. I hope so.", r"\text{St. Ives}"),
        ("The answer is: 0.5.", "0.5"),
        ("The answer is 3. I hope it is correct.", "3"),
        (r"\boxed{5}. The answer is:", "5"),
        (r"\boxed{3", None),
        (r"\boxed{}", None),
        ("The answer is: ", None),
        ("no answer", None),
    ],
)
def test_answers_in_texts(text, answer):
    assert extract_answer(text) == answer


SAME = r"""
\frac{1}{2} = \dfrac{1}{2}
\frac{1}{2} = 1/2
\frac{1}{2} = 0.5
\frac{1}{2} = .5
\frac12 = \frac{1}{2}
-\frac{3}{4} = \frac{-3}{4}
-\frac{3}{4} = -0.75
\frac{6}{8} = \frac{3}{4}
18 = 18.00
1,000,000 = 1000000
10{,}000 = 10000
10,\!000 = 10000
x = 5 === 5
x \in [1, 2] = [1,2]
\text{(A)} = (A)
\text{Even} = even
\mathrm{east} = \text{east}
12\text{ cm} = 12
12\text{ cm}^2 = 12
90^\circ = 90
90^{\circ} = 90
50\% = 50
\$5.50 = 5.5
\sqrt2 = \sqrt{2}
\sqrt{8} = 2\sqrt{2}
\frac{\sqrt{3}}{3} = \frac{1}{\sqrt{3}}
2\pi = \pi \cdot 2
2 \pi = 2\pi
x+1 = 1+x
(x+1)^2 = x^2+2x+1
\left( 1, 2 \right) = (1,2)
(1, \frac{1}{2}) = (1, 0.5)
\{1, 2\} = \{2, 1\}
1, 2 = 2, 1
(-\infty, 2) \cup (3, \infty) = (3,\infty)\cup(-\infty,2)
3 + 2i = 2i + 3
2^{10} = 1024
1234_5 = 1234_{5}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} = \begin{pmatrix}1\\2\end{pmatrix}
x \leq 3 = x \le 3
$7$ = 7
7. = 7
y = 2x + 3 === 2x+3
3 1/2 = \frac{7}{2}
3\frac{1}{2} = 7/2
-3 1/2 = -3.5
5 = 5 dollars
12 = 12 square inches
100 = 1e2
0.\overline{3} = \frac{1}{3}
-2.1\overline{6} = -\frac{13}{6}
10 000 = 10000
\dfrac 3 8 = 3/8
\frac12 = \frac 1 2
\log_2 8 = 3
2xyz = 2 xyz
81, 256 = 256, 81
45^\circ, 135^\circ = 135^\circ, 45^\circ
10,000 dollars = x = 10,000
\text{Yes} = yes
""".strip().splitlines()
DIFFERENT = (
    r"""
\frac{1}{2} = \frac{2}{1}
\frac{1}{3} = 0.33
\frac{1}{3} = 0.333333
3 = -3
18 = 18.5
1,000 = 100
2 = 2\pi
\pi = 3.14
\sqrt{2} = 2
\sqrt{2} = 1.414
(1, 2) = (2, 1)
(1, 2) = [1, 2]
(0, 1] = [0, 1)
\{1, 2\} = \{1, 2, 3\}
(1,2,3) = (1,2)
x \le 3 = x < 3
x+1 = x-1
x^2 = 2x
\text{even} = \text{odd}
\text{(A)} = (B)
i = -i
11_2 = 11
11_2 = 11_3
2^{10} = 2^{11}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} = \begin{pmatrix} 2 \\ 1 \end{pmatrix}
x = X
1:2 = 2:1
(-\infty, 2) = (-\infty, 2]
10 =
-\infty = \infty
\pi = 3.14159265
3 1/2 = 31/2
1 2 = 12
2 xyz = 2
5 hundred = 5
2 squared = 2
12 minus one = 12
81, 256 = 81256
60\%,120\% = 60120
x^2 = X^2
AB = ab
ABC = abc
0.\overline{3} = 0.3
0.\overline{3} = 0.33333333
""".rstrip("\n")
    .lstrip("\n")
    .splitlines()
)


def _pair(line):
    left, _, right = line.partition(" === ") if " === " in line else line.partition(" = ")
    return left, right


def test_hand_made_pairs():
    wrong = [line for line in SAME if not equivalent(*_pair(line))] + [line for line in DIFFERENT if equivalent(*_pair(line))]
    assert len(SAME) + len(DIFFERENT) >= 60
    assert wrong == []


def test_choices(data_folder):
    """Every published output of the tests names its answer, and nothing that does not is guessed."""
    for name, choices in CHOICES.items():
        path = data_folder / "commonsense" / name / "test.json"
        if path.exists():
            assert all(extract_choice(row["output"], choices) == row["answer"] for row in json.loads(path.read_text()))
    assert extract_choice("the correct answer is", CHOICES["boolq"]) is None
    assert extract_choice("False", CHOICES["boolq"]) is None  # as LLM-Adapters reads it


REFERENCES = 'mr,ref\n"name[A], eatType[pub]",A is a pub.\n"name[A], eatType[pub]",A pub: A.\nname[B],B is there.\n'


def files(folder, predictions, references=REFERENCES):
    (folder / "out.tsv").write_text(predictions, encoding="utf-8")
    (folder / "refs.csv").write_text(references, encoding="utf-8")
    return folder / "out.tsv", folder / "refs.csv"


def test_prediction_files(tmp_path):
    out, refs = files(tmp_path, 'MR\toutput\r\nname[B]\t"B\nis there."\r\n"name[A], eatType[pub]"\t\r\n')
    references = read_references(refs)
    assert list(references.values()) == [["A is a pub.", "A pub: A."], ["B is there."]]
    texts = read_predictions(out, references)
    assert texts == ["", "B\nis there."]
    assert score_e2e(texts, list(references.values()), ["BLEU"]) == score_e2e(["", "B is there."], list(references.values()), ["BLEU"])
    write_rows(out, [{"MR": mr, "output": text} for mr, text in zip(references, ['He said "yes"\tand went', "B"], strict=True)])
    assert read_predictions(out, references) == ['He said "yes"\tand went', "B"]


A_ROW = '"name[A], eatType[pub]"\tA is.\n'


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ("MR\toutput\n" + A_ROW, REFERENCES, r"no prediction for 1 of 2 meaning representations, such as 'name\[B\]'"),
        ("MR\toutput\n" + A_ROW + A_ROW, REFERENCES, "row 2 is a second prediction for 'name"),
        ("MR\toutput\nname[C]\tC\n", REFERENCES, r"row 1 is for 'name\[C\]', which has no reference"),
        ("MR\ttext\nname[B]\tB\n", REFERENCES, "no column 'output': it has mr, text"),
        ("MR\toutput\nname[B]\n", REFERENCES, "row 1 has 1 fields"),
        ("", REFERENCES, "no column 'mr'"),
        ("MR\toutput\n" + A_ROW, "mr,ref\n", "has no rows"),
        ("MR\toutput\n" + A_ROW, "mr,ref\nname[B], \n", "row 1 has no ref"),
        ("MR\toutput\n" + A_ROW, "mr,text\nname[B],B\n", "no column 'ref'"),
    ],
)
def test_bad_files(predictions, references, message, tmp_path):
    out, refs = files(tmp_path, predictions, references)
    with pytest.raises(DataError, match=message):
        read_predictions(out, read_references(refs))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_references(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("mr,ref\nname[Caf\xe9],x\n".encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        read_references(tmp_path / "latin.csv")


def test_no_java_and_no_such_metric(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="need Java, and there is no command `java`"):
        score_e2e(["a"], [["a"]])
    assert score_e2e(["a b c d"], [["a b c d"]], ["BLEU"]) == {"BLEU": 1.0}
    with pytest.raises(UsageError, match="unknown metric 'BLUE'"):
        score_e2e(["a"], [["a"]], ["BLUE"])
