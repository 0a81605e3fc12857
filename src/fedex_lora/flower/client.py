"""Flower's ClientApp around one party. Flower starts a process for every message, so nothing heavy is imported before it is needed."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedex_lora.errors import FedexLoraError, LacksError, UsageError
from fedex_lora.flower._messages import Packet, pack, unpack
from fedex_lora.flower._request import Request
from fedex_lora.flower._worker import ask


def client_app(config: Path) -> ClientApp:
    """The ClientApp of a run.

    Args:
        config: the run's configuration, a file of the app folder.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            packet = _answer(config, message, context)
        except FedexLoraError as error:
            packet = Packet(b"", {"error": str(error)} | ({"lacks": "yes"} if isinstance(error, LacksError) else {}))
        return Message(pack(packet), reply_to=message)

    return app


def _answer(config: Path, message: Message, context: Context) -> Packet:
    packet = unpack(message)
    if packet is None or not {"run", "base", "client"} <= packet.about.keys():
        raise UsageError("the server's message is not of this protocol: use one version of fedex-lora everywhere")
    about = {key: packet.about[key] for key in ("run", "base", "client")}
    node = dict(context.node_config)
    return Packet(ask(Request(payload=packet.payload, config=config.read_text(encoding="utf-8"), node=node, **about)), {})
