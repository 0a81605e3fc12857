"""Three sites in NVFlare's simulator, each a process of its own. Run it: python examples/join/over_nvflare.py"""

import os
from pathlib import Path

from party import NAMES, ROUNDS, RULES
from script import prepare

from fedex_lora.engines.nvflare import federation_job, simulate

if __name__ == "__main__":
    prepare(NAMES[0])[0].save_pretrained("trained/start")  # from which all begin
    folder, out = Path(__file__).parent, Path("trained/over-nvflare").absolute()
    os.environ["NVFLARE_FEDEX_LORA_PARTY"] = "script:prepare"  # each site's own setting; here all are on this machine
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    job = federation_job("join", str(Path("trained/start").absolute()), NAMES, ROUNDS, RULES.model_dump(exclude_defaults=True), str(out))
    raise SystemExit(simulate(job, "trained/nvflare-workspace", NAMES))
