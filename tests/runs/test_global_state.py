"""A run leaves its process as it found it, whether it ends well or not."""

import gc
import logging
import os
import random
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from tests.fake import Fake, setting
from tests.runs.test_run import ignore

from fedex_lora.client.training import BITSANDBYTES
from fedex_lora.errors import TrainingError
from fedex_lora.runs.run import run


def state():
    return {
        "environment": dict(os.environ),
        "folders": list(sys.path),
        "telemetry": constants.HF_HUB_DISABLE_TELEMETRY,
        "filters": list(warnings.filters),
        "verbosity": transformers.logging.get_verbosity(),
        "bars": (transformers.logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()),
        "logger": logging.getLogger(BITSANDBYTES).level,
        "threads": torch.get_num_threads(),
        "frozen": gc.get_freeze_count(),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_run_changes_in_its_process_is_undone(fails, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    datasets.enable_progress_bars()
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_info()
    logging.getLogger(BITSANDBYTES).setLevel(logging.NOTSET)
    monkeypatch.setattr(warnings, "filters", [])  # other commands of this process may have silenced the libraries before
    before = state()

    def home(config, emit):
        place = Fake(config, emit)
        transformers.set_seed(99)
        torch.set_num_threads(before["threads"] + 1)
        os.environ["A_LIBRARY"] = "was here"
        sys.path.append(str(tmp_path))
        within = state()
        assert [name for name in before if name != "frozen" and within[name] == before[name]] == []  # the check can fail
        if fails:
            raise TrainingError("it fails")
        return place

    try:
        run(setting(rounds=1), tmp_path / "run", ignore, home=home)
        assert not fails
    except TrainingError:
        assert fails
    finally:
        after = state()
        transformers.logging.set_verbosity_warning()
    assert {name for name in before if after[name] != before[name]} == set()
