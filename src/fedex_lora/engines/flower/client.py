"""Flower's ClientApp around one party. Flower starts a process for every message, so nothing heavy is imported before it is needed."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedex_lora.engines.flower._messages import from_record, to_record
from fedex_lora.engines.flower._request import NodeRequest, log_of
from fedex_lora.engines.flower._settings import is_private
from fedex_lora.engines.flower._worker import ask
from fedex_lora.errors import WireError
from fedex_lora.protocol.envelopes import answer_of, encode_failure
from fedex_lora.protocol.failures import failure_of, told_to_end
from fedex_lora.runs.party_log import log_failure


def client_app(config: Path) -> ClientApp:
    """The ClientApp of a run. Whatever fails, a code leaves and no text: Flower itself would send the text of an exception.

    Args:
        config: the run's configuration, a file of the app folder.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            reply = _answer(config, message, context)
        except BaseException as error:  # a panic of a library is no Exception, nor is an exit of the party's own code
            if told_to_end(error):
                raise
            failure, asked = failure_of(error), from_record(message)
            failure = failure.private if is_private(context.node_config, _text(config)) else failure
            log_failure(log_of(context.node_config), error, failure, "this node")
            reply = answer_of(asked[0], asked[1].get("client", ""), failure) if asked else encode_failure(failure, "")
        return Message(to_record(reply, {}), reply_to=message)

    return app


def _text(config: Path) -> str:
    """The run's configuration; what cannot be read is none, and whoever has none may be private."""
    try:
        return config.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _answer(config: Path, message: Message, context: Context) -> bytes:
    packet = from_record(message)
    if packet is None or not {"run", "base", "client"} <= packet[1].keys():
        raise WireError("the server's message is not of this protocol: use one version of fedex-lora everywhere")
    about = {key: packet[1][key] for key in ("run", "base", "client")}
    node = dict(context.node_config)
    return ask(NodeRequest(payload=packet[0], config=config.read_text(encoding="utf-8"), node=node, **about))
