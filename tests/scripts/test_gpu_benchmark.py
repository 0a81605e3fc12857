"""The GPU benchmark, with tiny models of the same architectures on the CPU; the real ones as shapes without memory."""

import json

import pytest
import torch
import transformers
from benchmarks import gpu


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    gpu.main(["--device", "cpu", "--scale", "tiny", "--peak-tflops", "0.1", "--out", str(out)])
    return json.loads(out.read_text())


def test_every_architecture_is_trained_aggregated_and_timed(report):
    assert report["facts"]["weights"] == "random"
    assert [row["model"] for row in report["rows"]] == ["Llama-3.2-3B", "Mistral-7B", "Gemma-2-9B"]
    for row in report["rows"]:
        assert row["aggregation"]["exactness_error"] < 1e-6
        assert row["side_path"]["rank"] == 2 * report["facts"]["rank"]  # (k - 1) r
        seconds = row["flops_per_token"] / (row["training"]["round_mfu"] * 1e11)  # a token's, from the other column
        assert row["training"]["round_tokens_per_second"] == pytest.approx(1 / seconds)
        assert row["training"]["round_over_plain"] > 0


def test_flops_of_a_token_by_hand(report):
    """The tiny Llama: q and o 64 x 64, k and v 32 x 64, three 128 x 64, in two layers, and 256 x 64 to the vocabulary."""
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) + 256 * 64
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (128 + 64))
    attention = 2 * 32 * 4 * 16  # layers, tokens, heads, their size
    assert report["rows"][0]["flops_per_token"] == 4 * weights + 6 * adapters + 6 * attention
    assert report["rows"][0]["adapter_bytes"] == 4 * adapters


@pytest.mark.parametrize(("name", "billions"), [("Llama-3.2-3B", 3.21), ("Mistral-7B", 7.24), ("Gemma-2-9B", 9.24)])
def test_the_configurations_are_those_of_the_models(name, billions):
    """Their published numbers of parameters (tied embeddings counted once)."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(gpu.ARCHITECTURES[name]())
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_plain_peft_runs_without_our_hooks():
    layer = torch.nn.Linear(2, 2)
    layer.base_delta = torch.nn.Identity()
    layer.register_forward_hook(lambda *_: torch.zeros(2))
    with gpu.without_hooks(layer):
        assert layer(torch.ones(2)).any()
    assert not layer(torch.ones(2)).any()


def test_what_does_not_fit_is_told_and_the_next_one_runs(monkeypatch):
    def full(name, options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GB\nmore")

    monkeypatch.setattr(gpu, "Bench", full)
    assert gpu.one("Mistral-7B", None) == {"model": "Mistral-7B", "error": "CUDA out of memory. Tried to allocate 4 GB"}
