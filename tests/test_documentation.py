"""README and docs: every command runs as written, every Python block runs, the table of keys is the code's, links lead somewhere."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from peft import LoraConfig, get_peft_model
from scripts import chosen_rates, reproduction_tables
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fedex_lora import __version__
from fedex_lora.aggregation import METHODS
from fedex_lora.cli import app
from fedex_lora.config import base_folder, read_config
from fedex_lora.storage.events import KINDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))

SHORTER = "--jobs 1 --set task.eval_rows=30 --set task.train_rows=96".split()  # of a protocol, which says its own, without the last


def blocks(language):
    return [(page, text) for page in PAGES for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)]


def commands():
    return [line for _, block in blocks("sh") for line in block.strip().replace("\\\n", " ").splitlines()]


def real(command):
    """Does it name folders that the reader must have?"""
    return "FOLDER" in command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as the README supposes it: the examples, and three adapters."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("site-a", "site-b", "site-c"):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base_folder()),
            LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
        )
        model.save_pretrained(folder / name)
    return folder


def test_every_command_runs_as_written(workplace, monkeypatch):
    """In the order of the pages. `make` only says what it would do: its targets are what CI and a fresh clone run.

    Scripts only show their help; comparisons have fewer rows, and stay in this process: what their workers cost is importing.
    """
    monkeypatch.chdir(workplace)
    ran = 0
    for command in (command for command in commands() if not real(command)):
        words = shlex.split(command)
        if words[0] == "make":
            done = subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True, text=True, check=False)
            assert done.returncode == 0, (command, done.stderr)
        elif words[0] == "pip":
            assert (ROOT / "constraints.txt").exists()
        elif words[0] == "python" and words[1].startswith("examples/"):
            assert (ROOT / words[1]).exists()  # tests/server/test_protocol_objects.py and tests/engines run it as it is
            if words[1].endswith("in_process.py"):  # what it leaves is used by the next commands
                with monkeypatch.context() as here:
                    here.syspath_prepend(ROOT / "examples" / "join")
                    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        elif words[:2] == ["python", "-m"]:
            done = subprocess.run([sys.executable, *words[1:], "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (command, done.stderr)
        elif words[0] == "python":
            with monkeypatch.context() as here:
                here.syspath_prepend((ROOT / words[1]).parent)
                here.setattr(sys, "argv", [words[1], "--help"])
                with pytest.raises(SystemExit) as ended:
                    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
            assert not ended.value.code, command
        else:
            assert words[0] == "fedex-lora", command
            shorter = SHORTER[: -2 if "--protocol" in words else None] * (words[1] == "compare")
            result = CliRunner().invoke(app, words[1:] + shorter)
            assert result.exit_code == 0, (command, result.stdout, result.stderr)
        ran += 1
    print(f"{ran} commands ran")
    assert ran >= 30


@pytest.mark.parametrize("command", [command for command in commands() if real(command)])
def test_commands_on_real_data_run(command, workplace, monkeypatch, data_folder, minilm, stories):
    """With the reader's folders filled in, and one round of a few rows."""
    monkeypatch.chdir(workplace)
    base = minilm if any(task in command for task in ("mrpc", "sst2", "table3")) else stories
    for name, folder in (
        ("DATA_FOLDER", data_folder),
        ("GLUE_FOLDER", data_folder / "glue"),
        ("E2E_FOLDER", data_folder / "e2e"),
        ("FOLDER", base),
    ):
        command = command.replace(name, str(folder))
    small = "--set rounds=1 --set task.train_rows=45 --set task.eval_rows=10"
    if " compare " in command:  # five clients with skewed labels need a few more rows; two methods, one seed, one rate
        small = small.replace("train_rows=45", "train_rows=100") + " --methods fedit,fedex --seeds 0 --learning-rates 3e-3 --jobs 1"
    if command.split()[1] in ("evaluate", "score"):
        small = "--rows 4 --generate max_new_tokens=4" if " evaluate " in command else ""
    result = CliRunner().invoke(app, shlex.split(f"{command} {small}")[1:])
    assert result.exit_code == 0, (command, result.stdout, result.stderr)


def test_every_python_block_runs(tmp_path, monkeypatch):
    found = blocks("python")
    assert found
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "join")
    for _, text in found:
        path = tmp_path / "block.py"
        path.write_text(text)
        with mock.patch.dict(METHODS):  # a page adds one
            names = runpy.run_path(str(path))
        if "state" in names:
            assert names["result"].numbers["max_relative_error"] < 1e-6
        if "residual" in names:
            assert names["result"].residual["q_proj"].rank == 8


def test_examples_are_valid():
    paths = sorted((ROOT / "examples").glob("*.toml"))
    assert len(paths) >= 3
    for path in paths:
        read_config(path)


def test_the_protocol_on_the_page_is_the_example():
    assert (ROOT / "examples/protocols/exactness.toml").read_text() in [text for _, text in blocks("toml")]


def test_the_tables_on_the_pages_are_the_code_s_and_what_was_measured():
    done = subprocess.run([sys.executable, "-m", "scripts.tables", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tables_of_the_paper_are_what_was_run(tmp_path):
    """The tables in results/ and the learning rates of the recipes, against the records."""
    assert ("table3", "small") in reproduction_tables.targets()
    assert not reproduction_tables.stale(tmp_path), "run python scripts/reproduction_tables.py"
    assert chosen_rates.RECIPE.read_text() == chosen_rates.recipe(tmp_path), "run python scripts/chosen_rates.py"


def test_commands_stand_in_blocks():
    """One outside of a block is not run by these tests, and reads badly."""
    for page in PAGES:
        outside = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)
        assert not re.findall(r"^ *fedex-lora [a-z]+ .*", outside, flags=re.M), page.name


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation():
    """A page that nobody can reach, or a link in the navigation to none, is found here; the rest by `make docs`."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r"- ([\w-]+\.md)$", navigation, flags=re.M)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def too_wide(text):
    """Lines of prose above 100 columns: outside of blocks, tables and pictures, and with a place to break them."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    lines = [line for line in prose.splitlines() if not line.lstrip().startswith(("|", "<", "!["))]
    return [line for line in lines if len(line) > 100 and " " in line.strip()[:100]]


def test_pages_are_short_and_their_prose_is_narrow():
    """At most 200 lines in docs, and 100 columns everywhere but in the changelog."""
    assert too_wide(f"a {'word ' * 20}")
    assert not too_wide(f"```\na {'word ' * 20}\n```\n| {'word ' * 20}|")
    for page in PAGES:
        text = page.read_text()
        assert page.name == "CHANGELOG.md" or not too_wide(text), page.name
        assert page.parent == ROOT or len(text.splitlines()) <= 200, page.name


def test_changelog_and_version_agree():
    headings = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(__version__)}, \d{{4}}-\d\d-\d\d", headings[1])


def test_events_are_documented():
    """Every event, and every field of it, stands in docs/events.md."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)", (ROOT / "docs" / "events.md").read_text(), flags=re.M))
    assert rows.keys() == {kind.name for kind in KINDS.values()}
    for name, row in rows.items():
        assert KINDS[name].model_fields.keys() - {"time"} <= set(re.findall(r"`(\w+)`", row)), name


def test_messages_that_are_explained_are_said_somewhere():
    """All parts of each between what differs, but for those that the code puts together from smaller ones."""
    together = ("with a label outside", "are cut at", "different values", "has no events.jsonl", "figures need")
    sources = " ".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    sources = re.sub(r'"\s*f?"', "", sources)
    for message in re.findall(r"\*\*`([^`]*)`", (ROOT / "docs" / "troubleshooting.md").read_text()):
        parts = [part.strip(" :;,.()'[]?") for part in re.split(r"\.\.\.|\b[A-Z]\w*\b|\b\d+\b", message)]
        assert any(part in message for part in together) or all(part in sources for part in parts), message


def test_clean_removes_no_run():
    done = subprocess.run(["make", "--no-print-directory", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rm", "-rf", ".venv", "site"]


def test_what_the_security_page_names_is_there():
    """The tests and targets by which each promise is held."""
    text = (ROOT / "SECURITY.md").read_text()
    assert [path for path in re.findall(r"`(tests/[\w/]+\.py)`", text) if not (ROOT / path).is_file()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {name for name in re.findall(r"`make ([\w-]+)`", text) if name not in targets} == set()


def test_what_the_readme_says_of_exactness_is_in_the_tables():
    """H2 in points, and balanced factors: `scripts.tables --check` compares those tables with the records."""
    names = ("docs/evidence-notes.md", "docs/evidence-topics.md", "docs/evidence-tables.md", "README.md")
    notes, topics, losses, readme = (" ".join((ROOT / name).read_text().split()) for name in names)
    for row in (
        "| fedex | fedit | 2 to 4 |",
        "| H2 | fedex | fedit | 6 to 8 |",
        "| H2 | fedex | fedit | 8 to 10 |",
        "| fedex+balanced | fedex | 8 to 10 |",
    ):
        value, half = (100 * float(part) for part in re.search(re.escape(row) + r" ([-+][.\d]+) ± ([.\d]+) \|", notes + topics).groups())
        said = re.sub(r"\b0\.", ".", f"{value:.1f} ± {half:.1f}")
        assert said in readme, (row, said)
    for row in ("| H2, balanced |", "| **H2, balanced momentum** |", "| momentum for fedit+balanced |", "| momentum for fedex+balanced |"):
        value, half = re.search(re.escape(row) + r" [^|]* \| [^|]* \| 4 to 6 \| -0?(\.\d+) ± 0?(\.\d+) \|", losses).groups()
        said = f"{round(float(value), 3)} ± {round(float(half), 3)}".replace("0.", ".")
        assert said in readme, (row, said)
