"""Every public name stands in the reference, and has an example or says where one is."""

import inspect
from pathlib import Path

import pytest

import fedex_lora

PAGE = (Path(__file__).parents[2] / "docs" / "reference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", fedex_lora.__all__)
def test_every_public_name_is_in_the_reference_with_an_example(name):
    assert any(line.strip().endswith(f".{name}") for line in PAGE.splitlines() if line.startswith(":::")) or f"fedex_lora.{name}`" in PAGE
    if name != "METHODS":  # a table
        assert "Example" in (inspect.getdoc(getattr(fedex_lora, name)) or "")
