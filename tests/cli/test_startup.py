"""What a start of the command line costs: which libraries it imports (its time is measured by benchmarks/bench_startup.py)."""

import os
import subprocess
import sys

import pytest

HEAVY = set("torch transformers peft accelerate datasets numpy pandas scipy sklearn pydantic rich safetensors".split())
SHOW = """
import sys
from fedex_lora.cli import app
try:
    app(sys.argv[1:])
finally:
    print(*sys.modules, file=sys.stderr)
"""


def imported(*arguments, code=SHOW):
    shown = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=os.environ)
    return {name.partition(".")[0] for name in shown.stderr.split()}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_no_heavy_library(arguments):
    assert not imported(*arguments) & HEAVY


def test_the_process_of_a_flower_message_imports_no_torch():
    """Flower starts one for every message, and the party's worker has the libraries loaded."""
    pytest.importorskip("flwr")
    code = "import sys, fedex_lora.engines.flower.client; print(*sys.modules, file=sys.stderr)"
    assert not imported(code=code) & {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors"}


def test_the_check_can_fail():
    assert "safetensors" in imported("--help", code="import safetensors\n" + SHOW)
