"""How much code there may be, and that a name means one thing."""

import ast
from collections import defaultdict

from tests.test_imports import ROOT

LINES = 31_441
FILE, FUNCTION = 300, 55  # lines; a function's without signature and docstring
ENTRIES = {
    "load",
    "NeedsFull",
    "aggregate",
    "run",
}  # each task module's `load`; one message of client and server; the mathematics and its public face

FILES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def length(function):
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return function.end_lineno - body[0].lineno + 1


def functions(text):
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def defined(text):
    """The public classes and functions of a module; not commands, which are named as what they call."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            words = [part.attr for decorator in node.decorator_list for part in ast.walk(decorator) if isinstance(part, ast.Attribute)]
            if "command" not in words:
                yield node.name


def test_the_whole_is_within_its_lines():
    assert sum(len(text.splitlines()) for text in FILES.values()) <= LINES


def test_files_are_short():
    assert {name for name, text in FILES.items() if len(text.splitlines()) > FILE} == set()


def test_functions_fit_a_screen():
    assert [f"{name}: {made.name}" for name, text in FILES.items() for made in functions(text) if length(made) > FUNCTION] == []


def test_a_public_name_means_one_thing():
    homes = defaultdict(set)
    for file, text in FILES.items():
        for name in defined(text):
            homes[name].add(file)
    assert {name: sorted(files) for name, files in homes.items() if len(files) > 1 and name not in ENTRIES} == {}


def test_the_measures_can_fail():
    text = 'def one():\n    """Says."""\n    a = 1\n\n    return a\n\n@app.command("x")\ndef two(): ...\n\nclass Three: ...\n'
    assert [length(made) for made in functions(text)] == [3, 1]
    assert list(defined(text)) == ["one", "Three"]
