"""The notebook, the reference's example and README's Python: executed, and typed by the strict rules of pyproject.toml."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from fedex_lora.errors import ModelError

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, capsys):
    shutil.copytree(ROOT / "examples" / "notes", tmp_path / "notes")
    names = {"__name__": "notebook"}
    with chdir(tmp_path):
        for number, cell in enumerate(CELLS):
            exec(compile(cell, f"cell {number}", "exec"), names)
    assert repr(names["result"]).startswith("<fedex: 2 rounds, loss ")
    assert capsys.readouterr().out.count("round ") >= 2
    assert (tmp_path / "notebook-model" / "model.safetensors").is_file()
    assert (tmp_path / "notebook-run" / "final").is_dir()
    assert names["mean"].numbers["max_relative_error"] < 1e-6
    assert (tmp_path / "notebook-for-parties" / "trainable").is_dir()
    assert not (tmp_path / "notebook-for-parties" / "updates").exists()


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


OWN = blocks("docs/reference.md")[0]


def test_a_model_a_metric_and_a_listener_of_the_users_own_in_20_lines(capsys):
    names = {"__name__": "own"}
    exec(compile(OWN, "own", "exec"), names)
    result, heard = names["result"], capsys.readouterr().out.split()
    assert len([line for line in OWN.splitlines() if line.strip()]) <= 20
    assert heard.count("round_done") == result.state.round == 5
    assert result.metrics["exactness_error"].max() < 1e-6
    assert list(result.metrics["share_of_red"])[-1] == list(result.metrics["accuracy"])[-1] / 2 == 0.5
    assert isinstance(result.model().get_base_model(), names["Words"])
    with pytest.raises(ModelError, match="Words does not say where its embeddings are: call the layer embed_tokens"):
        exec(compile(OWN.replace("embed_tokens", "words"), "own", "exec"), {"__name__": "own"})


def test_it_is_typed(tmp_path):
    """The notebook, the README's first two examples, and the one of the reference."""
    pytest.importorskip("mypy")
    texts = dict(zip(("notebook", "readme", "readme_run", "reference"), ["\n".join(CELLS), *blocks("README.md")[:2], OWN], strict=True))
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *(str(tmp_path / f"{name}.py") for name in texts)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


def test_it_is_kept_without_what_it_printed():
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"])
