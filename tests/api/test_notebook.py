"""The notebook and README's Python: executed, and typed by the strict rules of pyproject.toml (with `make check`'s cache)."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

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


README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("text", ["\n".join(CELLS), README[0]], ids=["notebook", "README"])
def test_it_is_typed(text, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "example.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "example.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


def test_it_is_kept_without_what_it_printed():
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"])
