"""Tasks that are measured by what a model writes: their files, prompts and scores, and bad data."""

import json

import pytest
from transformers import AutoTokenizer

from fedex_lora import config
from fedex_lora.config import base_folder
from fedex_lora.errors import DataError
from fedex_lora.tasks import load_task
from fedex_lora.tasks._task import IGNORED
from fedex_lora.tasks.arithmetic import as_metamath, score_gsm8k, score_math
from fedex_lora.tasks.scoring.choices import CHOICES
from fedex_lora.tasks.scoring.mathematics import equivalent, extract_answer


def task(name, data, **changes):
    return load_task(config.TaskSettings(name=name, data=data, max_length=4096, **changes), 0)


def test_e2e_as_the_lora_paper_prompts_it(data_folder, stories):
    """Slots in words, the begin token, the text, the end token; the loss on the last two."""
    loaded, tokenizer = task("e2e", data_folder), AutoTokenizer.from_pretrained(stories)
    assert (len(loaded.train), len(loaded.eval), len(loaded.generation.rows)) == (42061, 4672, 630)
    assert sum(map(len, loaded.generation.rows["ref"])) == 4693
    row = loaded.tokenize(tokenizer, loaded.train.head(1))[0]
    prompt = "name : The Vaults | Type : pub | price : more than £30 | customer rating : 5 out of 5 | near : Café Adriatic"
    assert tokenizer.decode(row["input_ids"]).startswith(f"<s> {prompt}<s>")
    assert loaded.generation.prompts(tokenizer, loaded.train.head(1)) == [prompt + "<s>"]
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt).strip() == f"{loaded.train['ref'][0]}</s>"
    settings = loaded.generation.settings
    assert [settings[key] for key in ("num_beams", "length_penalty", "no_repeat_ngram_size")] == [10, 0.9, 4]


def test_references_as_texts_score_like_people(data_folder):
    """The first reference of each as prediction: BLEU 1, because it matches itself."""
    loaded = task("e2e", data_folder, eval_rows=40)
    from fedex_lora.tasks.scoring.e2e import score_e2e

    rows = loaded.generation.rows
    assert len(rows) == 40
    assert score_e2e([refs[0] for refs in rows["ref"]], list(rows["ref"]), ["BLEU"])["BLEU"] == pytest.approx(1)


def test_arithmetic(data_folder):
    """GSM8K's training rows as a stand-in for MetaMathQA; gold responses score 100 %, and silence is counted, not dropped."""
    gsm8k = task("arithmetic/gsm8k", data_folder, train="gsm8k/train.jsonl")
    assert (len(gsm8k.train), len(gsm8k.eval)) == (7473, 1319)
    assert score_gsm8k(list(gsm8k.eval["response"]), gsm8k.eval) == {"accuracy": 1.0, "unanswered": 0.0}
    rows = gsm8k.eval.head(4)
    assert score_gsm8k(["", "I think 3", *rows["response"][2:]], rows) == {"accuracy": 0.5, "unanswered": 2.0}
    first = gsm8k.tokenize(AutoTokenizer.from_pretrained(base_folder()), gsm8k.train.head(1))
    assert len(first) == 1
    assert "<<" not in "".join(gsm8k.train["response"])
    assert gsm8k.generation.prompts(None, rows)[0].endswith("\n\n### Response: Let's think step by step.")

    math = task("arithmetic/math", data_folder, train="")
    assert (len(math.train), len(math.eval)) == (0, 5000)
    assert all(
        equivalent(extract_answer(gold), extract_answer(said))
        for gold, said in zip(math.eval["solution"], math.eval["response"], strict=True)
    )
    texts = [rf"Hence $\boxed{{{extract_answer(text)}}}$." for text in math.eval["solution"][:3]]
    assert score_math([*texts, "no idea"], math.eval.head(4)) == {"accuracy": 0.75, "exact_match": 0.75, "unanswered": 1.0}


def test_metamath_rows(tmp_path):
    """The published layout: a JSON list with query, response, type."""
    rows = [{"query": f"{n} + 1?", "response": f"One more.\nThe answer is: {n + 1}", "type": "GSM_AnsAug"} for n in range(5)]
    (tmp_path / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    loaded = task("arithmetic/gsm8k", tmp_path, train_rows=3)
    assert (len(loaded.train), len(loaded.eval)) == (3, 1)
    (tmp_path / "MetaMathQA-395K.json").unlink()
    with pytest.raises(DataError, match=r"MetaMathQA-395K.json, or task.train must name other training rows"):
        task("arithmetic/gsm8k", tmp_path)


def test_commonsense(data_folder):
    """LLM-Adapters' template, and gold outputs score 100 %."""
    found = [name for name in CHOICES if (data_folder / "commonsense" / name).is_dir()]
    assert len(found) == 7
    for name in found:
        loaded = task(f"commonsense/{name}", data_folder, train="boolq/train.json" if name == "boolq" else "")
        rows = loaded.generation.rows
        assert loaded.generation.score(list(rows["output"]), rows) == {"accuracy": 1.0, "unanswered": 0.0}
        assert loaded.generation.score([""] * len(rows), rows) == {"accuracy": 0.0, "unanswered": float(len(rows))}
        prompt = loaded.generation.prompts(None, rows.head(1))[0]
        assert prompt.startswith(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        )
        assert prompt.endswith("\n\n                ### Response:\n                ")
    with pytest.raises(DataError, match=r"hellaswag/test.json does not exist"):
        task("commonsense/hellaswag", data_folder, train="")


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("e2e", "trainset.csv", "mr,text\nname[A],x\n", "no column 'ref'"),
        ("e2e", "devset.csv", "mr,ref\nA pub,x\n", "is no meaning representation"),
        ("e2e", "trainset.csv", None, "trainset.csv does not exist: task.data must hold trainset.csv, devset.csv"),
        ("arithmetic/gsm8k", "test.jsonl", '{"question": "1?", "answer": "one"}\n', r"1 row with no 'response' \(line 1\)"),
        ("arithmetic/gsm8k", "test.jsonl", '{"question": "1?", "text": "one"}\n', "no column 'query'"),
        ("arithmetic/math", "test.jsonl", '{"problem": "1?", "answer": "1"}\n', "no column 'solution'"),
        ("arithmetic/math", "test.jsonl", '{"problem": "1?", "solution": "one"}\n', "1 row with no 'response'"),
        ("commonsense/boolq", "boolq/test.json", '[{"instruction": "?", "output": "x", "answer": "maybe"}]', "label 'maybe' outside"),
        ("commonsense/boolq", "boolq/test.json", '[{"instruction": "?", "answer": "true"}]', "no column 'output'"),
    ],
)
def test_bad_data(name, file, text, message, tmp_path):
    for other in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (tmp_path / other).write_text("mr,ref\nname[A],x\n")
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text) if text else path.unlink()
    with pytest.raises(DataError, match=message):
        _tokenised(task(name, tmp_path, **({} if name == "e2e" else {"train": ""})))


def _tokenised(loaded):
    return loaded.tokenize(AutoTokenizer.from_pretrained(base_folder()), loaded.eval)


def test_responses_of_no_layout():
    import pandas as pd

    with pytest.raises(DataError, match="no column 'query'"):
        as_metamath(pd.DataFrame({"text": ["x"]}), "rows")


def test_a_problem_without_a_number_is_refused_before_anything_is_written(tmp_path):
    rows = [{"question": "How many?", "answer": f"Some. #### {number}"} for number in ("4", "none")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="arithmetic/gsm8k, test set: row 2 has no number as its answer"):
        task("arithmetic/gsm8k", tmp_path, train="")
