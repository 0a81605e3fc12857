"""What a run changes in its process beside its own objects, and how that is undone at its end."""

import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import numpy as np
import torch
import transformers
from huggingface_hub import constants

from fedex_lora.client.training import BITSANDBYTES, silence_libraries
from fedex_lora.errors import UsageError

AT_WORK = threading.RLock()  # by the thread that runs: a run that its listener starts is within it, and undone before it goes on


@contextmanager
def alone() -> Iterator[None]:
    """No other thread of this process runs within: generators, threads and the trainers' state are the process's.

    Raises:
        UsageError: one does.
    """
    if not AT_WORK.acquire(blocking=False):
        raise UsageError("another run is at work in this process: wait for it, or start this one in a process of its own")
    try:
        yield
    finally:
        AT_WORK.release()


@contextmanager
def undone() -> Iterator[None]:
    """Silence the libraries within; afterwards the environment, the folders of modules, warning filters, loggers, progress bars, CPU
    threads and the states of the random generators are what they were before."""
    environment, threads, folders = dict(os.environ), torch.get_num_threads(), list(sys.path)
    verbosity, level = transformers.logging.get_verbosity(), logging.getLogger(BITSANDBYTES).level
    bars = transformers.logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    states = random.getstate(), np.random.get_state()
    telemetry = constants.HF_HUB_DISABLE_TELEMETRY
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with warnings.catch_warnings(), torch.random.fork_rng(gpus):
        silence_libraries()
        try:
            yield
        finally:
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            sys.path[:], constants.HF_HUB_DISABLE_TELEMETRY = folders, telemetry
            torch.set_num_threads(threads)
            transformers.logging.set_verbosity(verbosity)
            logging.getLogger(BITSANDBYTES).setLevel(level)
            for on, library in zip(bars, (transformers.logging, datasets), strict=True):
                if on:
                    library.enable_progress_bar() if library is transformers.logging else library.enable_progress_bars()
            random.setstate(states[0])
            np.random.set_state(states[1])
