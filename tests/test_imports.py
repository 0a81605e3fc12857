"""The layout: packages import one way, and the mathematics, the protocol and the server import no training library."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import fedex_lora

ROOT = Path(fedex_lora.__file__).parent
LEVELS = [
    level.split()
    for level in """
    errors
    types config
    aggregation
    exactness protocol
    storage
    models privacy
    tasks
    client server offline
    runs evaluation report
    engines experiments
    api cli
    """.strip().splitlines()
]
LEVEL = {package: number for number, level in enumerate(LEVELS) for package in level}
PURE = {"errors", "types", "aggregation", "exactness", "protocol", "server", "storage"}
TRAINING = {"transformers", "peft", "flwr", "accelerate", "datasets"}


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield from ([f"fedex_lora.{alias.name}" for alias in node.names] if node.module == "fedex_lora" else [node.module])


def test_every_module_has_its_place():
    assert {module for module, _ in sources()} == set(LEVEL)
    assert len(LEVELS) <= 12
    assert sum(map(len, LEVELS)) == len(LEVEL)


def test_packages_import_only_from_above():
    for module, path in sources():
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "fedex_lora" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != module:
                assert LEVEL[parts[1]] < LEVEL[module], f"{path.relative_to(ROOT)} imports {parts[1]}, which is not above it"


def test_mathematics_and_server_import_no_training_library():
    for module, path in sources():
        if module in PURE:
            assert not TRAINING & {name.split(".")[0] for name in imported(path)}, f"{path.relative_to(ROOT)}"


def declared():
    """The distributions that pyproject.toml names: of the core, and of each extra."""
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {plain(re.split(r"[\[<>=]", line)[0]) for line in lines} for extra, lines in lists.items()}


def plain(name):
    return name.lower().replace("_", "-")


def test_what_is_imported_is_declared():
    """Third-party packages: in the core, or in an extra where more than mathematics and server are."""
    homes, brought = packages_distributions(), set().union(*declared().values())
    for module, path in sources():
        for top in {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"fedex_lora"}:
            names = {plain(name) for name in homes[top]}
            assert names & (declared()[""] if module in PURE else brought), f"{path.relative_to(ROOT)}: {top} is not declared"


def test_the_check_can_fail():
    assert "transformers" in {name.split(".")[0] for name in imported(ROOT / "client" / "training.py")}


def test_public_names_exist():
    for name in fedex_lora.__all__:
        assert getattr(fedex_lora, name) is not None
