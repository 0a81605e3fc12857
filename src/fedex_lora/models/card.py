"""The README of an export: what it is, how far off, and the lines that load it."""

from collections.abc import Mapping
from typing import Any

from fedex_lora.config import Base
from fedex_lora.models.build import head_rows
from fedex_lora.models.loading import AUTO, Kind, quantization_settings
from fedex_lora.storage.result import StoredResult


def model_card(facts: Mapping[str, Any], numbers: Mapping[str, Any], result: StoredResult, kind: Kind) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        facts: of the export's manifest.
        numbers: what comparing it with the run gave.
        result: what is exported.
        kind: of model.
    """
    cut = (
        f" It is cut to rank {numbers['rank']}: {numbers['update_error']:.2e} of the update is missing." if numbers["update_error"] else ""
    )
    dtype, quantization = facts.get("base_dtype", "float32"), facts.get("base_quantization", "none")
    kept = ", and is for the base stored so" if facts["format"] == "adapter" else f"; this export holds it as {facts['dtype']}"
    stored = "" if (dtype, quantization) == ("float32", "none") else f" (trained on it in {dtype}, quantization {quantization}{kept})"
    library = "transformers" if facts["format"] == "merged" else "peft"
    computed = "computed in float32" if numbers["output_bound"] is None else f"computed in {facts['dtype']}"
    return f"""---
base_model: {facts["base_model"]}
library_name: {library}
---
# {facts["format"]} export of a federated LoRA run

Method {facts["method"]}, round {facts["round"]}, base {facts["base_model"]}{stored}, by fedex-lora {facts["fedex-lora"]}.{cut}
Reloaded after writing: its logits, {computed}, differ from the run's by {numbers["output_error"]:.1e} of the largest.
{_privacy(result)}`manifest.json` has a checksum of every file. In this folder, plain libraries load it so:

```python
{_loading(facts, numbers, result, kind)}
```
"""


_BEFORE = """
That is of this run alone. It went on from {folder}, whose own privacy was: {privacy}. What was learnt there, of the same rows too, is not
covered.
"""


def _privacy(result: StoredResult) -> str:
    """What the run promised of each party's rows; nothing of a run that promised nothing."""
    privacy = result.manifest.get("privacy")
    if not privacy:
        return ""
    start = result.manifest.get("start")
    before = "" if start is None else _BEFORE.format(**{"folder": "an earlier result", "privacy": "none", **start})
    return """
## Privacy

Trained by DP-SGD at each party. Of each party's own rows the whole run, with all of its {rounds} rounds, says at most epsilon =
{epsilon:g} at delta = {delta:g}. Unit: one {unit} (whoever has several of them has less protection); relation: {relation}. Accountant:
{accountant}; gradients of a record were clipped to norm {clip_norm:g}. Other runs on the same rows spend more; each party's ledger has
the sum.
{before}
""".format(**privacy, before=before)


def _loading(facts: Mapping[str, Any], numbers: Mapping[str, Any], result: StoredResult, kind: Kind) -> str:
    form, auto, labels = facts["format"], AUTO[kind], result.manifest.get("labels", [])
    base = {"merged": ".", "adapter": Base(model=facts["base_model"]).source, "base+adapter": "base"}[form]
    dtype, packed = facts["dtype"], facts.get("base_quantization", "none") if form == "adapter" else "none"
    if form == "adapter" and dtype == "float32":
        dtype = facts.get("base_dtype", dtype)  # it is for the base as that was stored, whatever it computes in
    options = [f"{base!r}", f"dtype={dtype!r}"]
    if packed != "none":
        settings = quantization_settings(Base(model=facts["base_model"], dtype=dtype, quantization=packed), kind).to_diff_dict()
        said = ", ".join(f"{key}={value!r}" for key, value in settings.items() if not key.startswith("_"))
        options.append(f"quantization_config=BitsAndBytesConfig({said})")
    if form == "adapter" and (rows := head_rows(result)):
        names = dict(enumerate(labels))
        options.append(f"num_labels={rows[0]}")
        options += [f"id2label={names!r}", f"label2id={ {label: index for index, label in names.items()}!r}"] if names else []
    name = "model" if form == "merged" else "base"
    wide = ".float()" if packed == "none" and dtype != facts["dtype"] else ""
    imported = auto if packed == "none" else f"{auto}, BitsAndBytesConfig"
    lines = [f"from transformers import {imported}", "", f"{name} = {auto}.from_pretrained({', '.join(options)}){wide}"]
    if numbers["tokens"]:
        lines.append(f"base.resize_token_embeddings({numbers['tokens']})  # the adapter has tokens of its own")
    if form != "merged":
        folder = "." if form == "adapter" else "adapter"
        lines = ["from peft import PeftModel", *lines, f'model = PeftModel.from_pretrained(base, "{folder}")']
    return "\n".join(lines)
