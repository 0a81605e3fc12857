"""NVFlare: a controller around `Server`, an executor around `Client`, and the job that holds both.

Each site says which function of its own trains: `NVFLARE_FEDEX_LORA_PARTY=module:function` (docs/join-transports.md).
"""

from fedex_lora.errors import require_extra

require_extra("nvflare", "nvflare", "federations over NVFlare")

from fedex_lora.engines.nvflare.controller import FederationController  # noqa: E402
from fedex_lora.engines.nvflare.executor import PartyExecutor  # noqa: E402
from fedex_lora.engines.nvflare.job import federation_job, simulate  # noqa: E402

__all__ = ["FederationController", "PartyExecutor", "federation_job", "simulate"]
