"""What a server holds does not grow with clients times message: messages become bytes one at a time, over one body."""

import tracemalloc

import torch
from tests.messages import told

from fedex_lora.aggregation.server_state import init
from fedex_lora.config import Rules
from fedex_lora.server.server import Server
from fedex_lora.types import LoRAPair

CLIENTS = [f"client-{index:02d}" for index in range(20)]


def messages():
    adapter = {"m": LoRAPair(torch.randn(4, 5000), torch.randn(5000, 4))}
    return Server(Rules(), init(adapter, {}), CLIENTS).open_round().messages


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


def test_a_body_is_encoded_once_for_all_clients_of_a_version(monkeypatch):
    from fedex_lora.server import requests

    bodies, encode = [], requests.encode_body
    monkeypatch.setattr(requests, "encode_body", lambda *args: bodies.append(encode(*args)) or bodies[-1])
    sent = messages()
    assert all(payload.endswith(bodies[0].payload) for payload in sent.values())
    assert len(bodies) == 1


def test_they_are_the_clients_messages_and_only_those_asked_for_are_counted():
    sent = messages()
    assert list(sent) == CLIENTS
    assert sent.size == 0
    assert told(sent["client-07"])["client"] == "client-07"
    assert 0 < sent.size == len(sent["client-07"])
