"""Folders `roberta-base`, `roberta-large` and `gpt2` with the configurations of those models, a tokenizer of single bytes, and no weights.

python scripts/untrained_models.py FOLDER

With `--set base.random_weights=true` they stand in for the real ones where only shapes and bytes matter.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, PretrainedConfig, PreTrainedTokenizerFast, RobertaConfig

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
CONFIGS: dict[str, PretrainedConfig] = {
    "roberta-base": RobertaConfig(**ROBERTA),
    "roberta-large": RobertaConfig(**ROBERTA, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "gpt2": GPT2Config(),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, framed as RoBERTa frames a text or a pair."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def write(folder: Path, names: tuple[str, ...] = tuple(CONFIGS)) -> None:
    """The folders of the models named, in `folder`."""
    for name in names:
        CONFIGS[name].save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
