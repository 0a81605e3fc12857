"""What a server holds does not grow with clients times message: messages become bytes one at a time."""

import tracemalloc

import torch

from fedex_lora.protocol.delta_sync import CatchUp
from fedex_lora.protocol.messages import Download, decode_download
from fedex_lora.runs.round_loop import Encoded
from fedex_lora.types import LoRAPair

CLIENTS = [f"client-{index}" for index in range(20)]


def messages():
    adapter = {"m": LoRAPair(torch.randn(4, 5000), torch.randn(5000, 4))}
    return Encoded(
        {
            name: (
                Download(kind="train", run="run", round=1, client=name, method="fedex", adapter=adapter, other={}, catch_up=CatchUp(0, 0)),
                "",
            )
            for name in CLIENTS
        }
    )


def peak_of(work):
    tracemalloc.start()
    try:
        kept = work()
        return tracemalloc.get_traced_memory()[1], kept
    finally:
        tracemalloc.stop()


def test_messages_are_bytes_one_at_a_time():
    sent = messages()
    one, _ = peak_of(lambda: len(sent[CLIENTS[0]]))
    few, sizes = peak_of(lambda: [len(payload) for payload in sent.values()])
    assert few < 2 * one
    everything, _ = peak_of(lambda: dict(sent))  # the check can fail
    assert everything > 5 * one
    assert sent.size == sum(sizes)


def test_they_are_the_clients_messages_and_only_those_asked_for_are_counted():
    sent = messages()
    assert list(sent) == CLIENTS
    assert sent.size == 0
    assert decode_download(sent["client-7"]).client == "client-7"
    assert 0 < sent.size == len(sent["client-7"])
