"""fedex-lora: exact federated fine-tuning with LoRA. `aggregate` is the mathematics; `load_model` opens what a run made."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "METHODS",
    "AdaptedModel",
    "Aggregate",
    "AggregatedFolders",
    "Client",
    "ClientUpdate",
    "LoRAPair",
    "LowRank",
    "Rules",
    "RunResult",
    "Server",
    "ServerState",
    "aggregate",
    "load_model",
    "run",
    "save_result",
]

if TYPE_CHECKING:
    from fedex_lora.aggregation import METHODS
    from fedex_lora.api.aggregating import AggregatedFolders, aggregate
    from fedex_lora.api.running import RunResult, run
    from fedex_lora.client.client import Client
    from fedex_lora.config import Rules
    from fedex_lora.models.adapted import AdaptedModel
    from fedex_lora.models.build import load_model
    from fedex_lora.server.result import save_result
    from fedex_lora.server.server import Server
    from fedex_lora.types import Aggregate, ClientUpdate, LoRAPair, LowRank, ServerState

_HOMES = {
    "METHODS": "aggregation",
    "AdaptedModel": "models.adapted",
    "Client": "client.client",
    "Rules": "config",
    "Server": "server.server",
    "AggregatedFolders": "api.aggregating",
    "RunResult": "api.running",
    "aggregate": "api.aggregating",
    "load_model": "models.build",
    "run": "api.running",
    "save_result": "server.result",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `fedex-lora --help` does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'fedex_lora' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fedex_lora.{_HOMES.get(name, 'types')}"), name)
