"""Chats: tokens and loss masks beside TRL's and beside masks written by hand, layouts, refusals, and a federation that learns them."""

import csv
import json
import random
from datetime import datetime
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tests.runs.test_run import events_of, ignore
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.utils import chat_template_utils
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import TaskSettings, parse_config, write_config
from fedex_lora.errors import DataError, FedexLoraError, ModelError
from fedex_lora.models.export import export
from fedex_lora.offline.verify import verify
from fedex_lora.runs.check import check
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.tasks import IGNORED, load_task, usable
from fedex_lora.tasks._chat_template import Chat, chat_tokens, tokenize_chats, turn_ends
from fedex_lora.tasks._chat_words import THOUGHTS
from fedex_lora.tasks._completions import FULL
from fedex_lora.tasks._files import as_text

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}"
    "{{- bos_token }}{%- for message in turns %}{%- if message['role'] == 'user' %}"
    "{%- if system is defined and message == users[-1] %}{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
DROPS_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PATTERN = (  # Llama 3's and Qwen2.5's: new lines that follow each other are one token, whatever comes then
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKERS = {
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen2_5": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("<s>", "</s>"),
}
WORDS = [
    "What colour has the sky? It is blue, at night it is black.",
    "system user assistant model tool",
    "brief\n\n Yes\n No.\n",
] * 3
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Now", "parameters": {"type": "object", "properties": {}}}}]


def said(*turns):
    """`"user: Hi"` as a message."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


CALLED = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}]
CHATS = {
    "single": said("user: What colour has the sky?", "assistant: It is blue."),
    "system": said("system: You are brief.", "user: Sky?", "assistant: Blue."),
    "several": said("user: Sky?", "assistant: Blue.", "user: At night?", "assistant: Black.", "user: Sure?", "assistant: Yes."),
    "tool": [*said("user: Rain?"), {"role": "assistant", "tool_calls": CALLED}, *said("tool: dry", "assistant: No.")],
    "edges": said("user:   Größe 🙂?\n", "assistant: \n 你好 – “ok” 🙂🙂  \n\n", "user: \tand\r\n", "assistant: ü"),
}
PLAIN = said("user: Sky?", "assistant: Blue.")
SYSTEM = [{"role": "system", "content": "Brief."}, *PLAIN]
LEFT_OUT = {"llama3": {"tool"}, "gemma": {"tool", "system"}, "qwen2_5": set()}  # what these templates do not write


def template_of(name):
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name, template, trim=False, pattern=PATTERN):
    """A byte-level BPE of a few words, with the family's own markers; as real ones, it puts its begin token before a text by itself."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=list(MARKERS[name])))
    begin, end = MARKERS[name][:2]
    around = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, core.token_to_id(begin))])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), around])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token=end, pad_token=end, chat_template=template)


def tiny(tokenizer, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **ids, **more))


def trl_rows(name, tokenizer, chats, folder):
    """Token ids and labels that TRL's trainer prepares with `assistant_only_loss`."""
    from trl import SFTConfig, SFTTrainer

    rows = [{"messages": chat, "tools": json.dumps(TOOLS) if any("tool_calls" in turn for turn in chat) else None} for chat in chats]
    options = {"max_length": None, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "loss_type": "nll"}
    arguments = SFTConfig(output_dir=str(folder), assistant_only_loss=True, **options)
    made = SFTTrainer(
        model=tiny(tokenizer), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train_dataset
    return [(row["input_ids"], row["labels"]) for row in made]


def ours(tokenizer, chat):
    return chat_tokens(tokenizer, Chat(chat, TOOLS if any("tool_calls" in turn for turn in chat) else None))


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma"])
def test_tokens_and_masks_are_those_of_trl(name, tmp_path):
    """TRL takes a template of its own with marks; ours has none, and is read turn by turn.

    Under Qwen2.5's TRL also trains on the new line between `assistant` and the answer, which we count to the words that ask for it: it is
    what `add_generation_prompt` writes, so no model has to say it. Where the answer begins with a new line, both are one token, in both.
    """
    tokenizer = tokenizer_of(name, template_of(name))
    chats = [chat for kind, chat in CHATS.items() if kind not in LEFT_OUT[name]]
    for chat, (ids, labels) in zip(chats, trl_rows(name, tokenizer_of(name, template_of(name)), chats, tmp_path), strict=True):
        mine, learnt = ours(tokenizer, chat)
        assert mine == ids
        differ = [place for place, pair in enumerate(zip(learnt, labels, strict=True)) if pair[0] != pair[1]]
        if name != "qwen2_5":
            assert differ == []
            continue
        assert all(tokenizer.decode(ids[place]) == "\n" and labels[place] != IGNORED == learnt[place] for place in differ)
        heads = [place for place in range(len(ids)) if tokenizer.decode(ids[: place + 1]).endswith("<|im_start|>assistant")]
        plain = [not turn.get("content", "").startswith("\n") for turn in chat if turn["role"] == "assistant"]
        assert [place - 1 for place in differ if place - 1 in heads] == [head for head, one in zip(heads, plain, strict=True) if one]
    for kind in LEFT_OUT[name]:
        with pytest.raises(DataError, match=r"chat template of .* (leaves out|refuses)"):
            tokenize_chats(tokenizer, [Chat(CHATS[kind], TOOLS if kind == "tool" else None)], 512)


def by_hand(tokenizer, *pieces):
    """Token ids and labels of texts of which every other one, from the second on, is learnt."""
    ids, labels = [], []
    for place, piece in enumerate(pieces):
        own = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += own
        labels += own if place % 2 else [IGNORED] * len(own)
    return ids, labels


DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
HEAD = "<|im_start|>assistant\n"
WRITTEN = {
    ("smollm2", "single"): (f"{DEFAULT}<|im_start|>user\nWhat colour has the sky?<|im_end|>\n{HEAD}", "It is blue.<|im_end|>\n"),
    ("smollm2", "system"): (
        f"<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nSky?<|im_end|>\n{HEAD}",
        "Blue.<|im_end|>\n",
    ),
    ("smollm2", "several"): (
        *(f"{DEFAULT}<|im_start|>user\nSky?<|im_end|>\n{HEAD}", "Blue.<|im_end|>\n"),
        *(f"<|im_start|>user\nAt night?<|im_end|>\n{HEAD}", "Black.<|im_end|>\n"),
        *(f"<|im_start|>user\nSure?<|im_end|>\n{HEAD}", "Yes.<|im_end|>\n"),
    ),
    ("smollm2", "edges"): (  # the new line before the answer and the answer's own are one token, with the space behind a third
        f"{DEFAULT}<|im_start|>user\n  Größe 🙂?\n<|im_end|>\n<|im_start|>assistant",
        "\n\n 你好 – “ok” 🙂🙂  \n\n<|im_end|>\n",
        "<|im_start|>user\n\tand\r\n<|im_end|>\n<|im_start|>assistant\n",
        "ü<|im_end|>\n",
    ),
    ("mistral", "single"): ("<s> [INST] What colour has the sky? [/INST]", " It is blue.</s>"),
    ("mistral", "several"): (
        *("<s> [INST] Sky? [/INST]", " Blue.</s>", " [INST] At night? [/INST]", " Black.</s>", " [INST] Sure? [/INST]", " Yes.</s>"),
    ),
    ("mistral", "edges"): (*("<s> [INST]   Größe 🙂?\n [/INST]", " \n 你好 – “ok” 🙂🙂  \n\n</s>", " [INST] \tand\r\n [/INST]", " ü</s>"),),
}
TEMPLATES = {"smollm2": SMOLLM2, "mistral": MISTRAL}


@pytest.mark.parametrize(("name", "kind"), WRITTEN)
@pytest.mark.parametrize("trim", [False, True], ids=["offsets", "trimmed offsets"])
def test_masks_are_those_written_by_hand(name, kind, trim):
    """Also where a tokenizer's offsets leave out white space, as RoBERTa's do."""
    tokenizer = tokenizer_of(name, TEMPLATES[name], trim)
    assert ours(tokenizer, CHATS[kind]) == by_hand(tokenizer, *WRITTEN[name, kind])


def test_a_template_with_marks_says_itself_what_is_learnt():
    """Beside what transformers makes of them; ours of the unmarked template has the new line less (see above)."""
    for name in ("qwen2_5_training", "llama3_training"):
        tokenizer = tokenizer_of(name.removesuffix("_training"), template_of(name))
        for chat in (CHATS["single"], CHATS["several"]):
            ids, labels = ours(tokenizer, chat)
            given = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
            assert ids == given["input_ids"]
            assert [label != IGNORED for label in labels] == [bool(on) for on in given["assistant_masks"]]


ANSWERS = ("Blue", "Black", "Yes")


def test_every_turn_is_learnt_once_and_what_is_given_never():
    """Of a preference's prompt nothing is learnt, under a template with marks and without."""
    answers = 0
    for name in ("qwen2_5", "qwen2_5_training"):
        tokenizer = tokenizer_of("qwen2_5", template_of(name))
        _, every = ours(tokenizer, CHATS["several"])
        _, last = chat_tokens(tokenizer, Chat(CHATS["several"], given=5))
        assert tokenizer.decode([label for label in every if label != IGNORED]).split() == [f"{word}.<|im_end|>" for word in ANSWERS]
        assert tokenizer.decode([label for label in last if label != IGNORED]).strip() == "Yes.<|im_end|>"
        answers += sum(one != other for one, other in zip(every, last, strict=True))
    assert answers


def test_a_long_chat_is_cut_at_its_right_end_and_counted():
    tokenizer = tokenizer_of("smollm2", SMOLLM2)
    whole, labels = ours(tokenizer, CHATS["several"])
    rows = tokenize_chats(tokenizer, [Chat(CHATS["several"]), Chat(CHATS["single"])], len(whole) - 1)
    assert (rows[0]["input_ids"], rows[0]["labels"], rows[0][FULL]) == (whole[:-1], labels[:-1], len(whole))
    _, notes = usable(rows, TaskSettings(name="custom", kind="chat"), "a")
    assert notes == [f"a: 1 of 2 rows are cut at task.max_length = {len(whole) - 1} (the longest has {len(whole)} tokens)"]


@pytest.mark.parametrize("written", ["{{ range(1000) | random }}", "{{ strftime_now('%d %b %Y %f') }}"])
def test_a_template_that_draws_by_chance_or_reads_the_clock_writes_alike_for_each_chat(written):
    """So that no chat changes another, and the same rows are the same tokens again, whatever else drew, and on another day."""
    tokenizer = tokenizer_of("smollm2", written + SMOLLM2)
    one, other = Chat(CHATS["single"]), Chat(CHATS["several"])
    random.seed(5)
    state = random.getstate()
    first = tokenize_chats(tokenizer, [one], 512)["input_ids"][0]
    assert random.getstate() == state
    random.seed(6)
    assert tokenize_chats(tokenizer, [other, other, one], 512)["input_ids"][2] == first
    assert chat_template_utils.datetime is datetime


def test_a_prompt_that_has_other_tokens_alone_is_said():
    """Under GPT-2's rule two new lines are two tokens before a word and one at the end, where Llama 3's template stops to ask."""
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for pattern, torn in ((PATTERN, False), (gpt2, True)):
        tokenizer = tokenizer_of("llama3", template_of("llama3"), pattern=pattern)
        alone = tokenizer.apply_chat_template(PLAIN[:1], add_generation_prompt=True)["input_ids"]
        whole, _ = ours(tokenizer, PLAIN)
        assert (whole[: len(alone)] != alone) == torn
        _, notes = usable(tokenize_chats(tokenizer, [Chat(PLAIN)], 512), TaskSettings(name="custom", kind="chat"), "a")
        assert [note.startswith("a: in 1 of 1 rows what asks for the answer has other tokens") for note in notes] == [True] * torn


LEAVES = r"leaves out, changes or moves a turn of the role {} \("
NAMES_CALLS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{{ message.content }}{% for call in message.tool_calls %}"
    "{{ 'CALL ' + call.function.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def called(**arguments):
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]}


@pytest.mark.parametrize("written", ["{{ call.function.arguments | tojson }}", "{% for k, v in args %}{{ k }}={{ v }} {% endfor %}"])
def test_arguments_of_calls_are_found_in_every_form(written):
    """As JSON, and each by itself; and what the assistant thinks, where a template writes it."""
    more = "{% set args = call.function.arguments.items() %}" + written
    template = NAMES_CALLS.replace("{% endfor %}{{ '<|im_end|>", f"{more}{{% endfor %}}{{{{ '<|im_end|>", 1)
    tokenizer = tokenizer_of("qwen2_5", template.replace("{{ message.content", "{{ message.thinking }}{{ message.content", 1))
    call = called(city='Bonn "am Rhein"\n', days=2, dry=True, where={"x": [0.5, "ü"]} if "tojson" in written else "ü", none=None)
    ids, labels = chat_tokens(tokenizer, Chat([*said("user: Rain?"), {**call, "thinking": "Is it?"}, *said("tool: dry", "assistant: No.")]))
    learnt = tokenizer.decode([label for label in labels if label != IGNORED])
    assert (len(ids) > len(learnt.split()), learnt.startswith("Is it?CALL weather"), "am Rhein" in learnt) == (True, True, True)


def test_an_answer_without_a_learnt_end_is_said():
    """GLM-4-MoE's turns end where the next begins; TRL's template for it marks that; here also marks that leave the end out."""
    marked = SMOLLM2.replace("message['content'] +", "'' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{")
    for name, template, is_open in (
        ("qwen2_5", template_of("glm4moe"), True),
        ("qwen2_5", template_of("glm4moe_training"), False),
        ("qwen2_5", template_of("qwen2_5"), False),
        ("qwen2_5", template_of("qwen2_5_training"), False),
        ("smollm2", SMOLLM2, False),
        ("smollm2", marked, True),
        ("mistral", MISTRAL, False),
    ):
        rows = tokenize_chats(tokenizer_of(name, template), [Chat(PLAIN)], 512)
        _, notes = usable(rows, TaskSettings(name="custom", kind="chat"), "a")
        assert [note.startswith("a: in 1 of 1 rows the chat template ends an answer with nothing") for note in notes] == [True] * is_open


class Slow:
    """All that is asked of a tokenizer without offsets before it is refused."""

    is_fast, chat_template, name_or_path = False, SMOLLM2, "slow"


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (DROPS_SYSTEM, CHATS["system"], r"leaves out, changes or moves a turn of the role system \(a.jsonl:1, a.jsonl:2\): save with"),
        (DROPS_SYSTEM, said("system: Be kind.", "user: Be kind. Sky?", "assistant: b"), LEAVES.format("system")),
        (DROPS_SYSTEM.replace("'system'", "'tool'"), said("user: a", "tool: is", "assistant: b"), LEAVES.format("tool")),
        *((SMOLLM2, [PLAIN[0], {**PLAIN[1], name: "It is day."}], LEAVES.format("assistant")) for name in THOUGHTS),
        (NAMES_CALLS, [*CHATS["tool"][:2], *said("tool: city Bonn", "assistant: No.")], LEAVES.format("(tool|assistant)")),
        (NAMES_CALLS, [*said("user: a"), called(days=1), *said("assistant: days 1")], LEAVES.format("assistant")),
        (MISTRAL, CHATS["system"], r"refuses chats: Conversation roles must alternate"),
        (MISTRAL, said("user: a", "tool: b", "assistant: c"), r"refuses chats: Only user and assistant roles"),
        ("deepseek_r1_distill", PLAIN, "asks for an answer in other words than it writes before one"),
        (MISTRAL_V3, [*CHATS["system"], *CHATS["single"]], "writes a turn in another way once others follow it"),
        ("qwen3", [*CHATS["single"], *CHATS["several"]], r"writes a turn in another way once others follow it.*\{% generation %\}"),
        ("qwen2_5", said("developer: Brief.", "user: a", "assistant: b"), "leaves out, changes or moves a turn of the role developer"),
        (SMOLLM2, CHATS["tool"], r"refuses chats: UndefinedError \("),
        (  # nothing of a row is said
            "{{ raise_exception('Only a user may say: ' + messages[0]['content']) }}",
            said("user: a secret", "assistant: b"),
            r"refuses chats: Only a user may say: \(",
        ),
        ("{% for message in messages %}{{ message['content'] }}", CHATS["single"], "refuses chats: "),
        ("{% for one in messages %}{{ one['content'] }}{% endfor %}{% generation %}{% endgeneration %}", PLAIN, "does not mark all"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_in_one_line(template, chat, message):
    name = "mistral" if template in (MISTRAL, MISTRAL_V3) else "qwen2_5"
    tokenizer = tokenizer_of(name, template if "{" in template else template_of(template))
    tokenizer.name_or_path = "some/model"
    with pytest.raises(DataError, match="^the chat template of some/model " + message) as raised:
        tokenize_chats(tokenizer, [Chat(chat, None, 0, "a.jsonl:1"), Chat(chat, None, 0, "a.jsonl:2")], 512)
    assert "\n" not in str(raised.value)
    assert "(a.jsonl:1, a.jsonl:2): " in str(raised.value)
    assert (raised.value.code, raised.value.rows) == ("rows", 2)


def test_a_tool_that_the_template_leaves_out_and_tokenizers_without_a_template_or_offsets():
    tokenizer = tokenizer_of("smollm2", SMOLLM2)
    with pytest.raises(DataError, match="leaves out the tools"):
        tokenize_chats(tokenizer, [Chat(CHATS["single"], TOOLS)], 512)
    with pytest.raises(ModelError, match="the tokenizer of slow does not say where its tokens are in the text"):
        tokenize_chats(Slow(), [Chat(CHATS["single"])], 512)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template: use a model that was made for chats"):
        tokenize_chats(tokenizer, [Chat(CHATS["single"])], 512)


@pytest.mark.parametrize(("name", "end"), [("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("qwen2_5", "<|im_end|>")])
def test_an_answer_ends_where_the_template_ends_it(name, end):
    """Llama 3's and Gemma's end token is another; what the model's generation_config names ends it, too."""
    tokenizer = tokenizer_of(name, template_of(name))
    model = tiny(tokenizer)
    model.generation_config.eos_token_id = [7, 9]
    assert turn_ends(tokenizer, model) == sorted({7, 9, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)})


def written(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return load_task(TaskSettings(name="custom", kind="chat", data=folder, train=name, eval=name), 0)


@pytest.mark.parametrize(
    ("row", "messages", "note"),
    [
        ({"messages": PLAIN, "prompt": "Sky?"}, PLAIN, None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Sky?"}]}, PLAIN[1]]}, PLAIN, None),
        ({"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]}, PLAIN, "ShareGPT's conversations"),
        (
            {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}], "system": "Brief."},
            [{"role": "system", "content": "Brief."}, *PLAIN],
            "ShareGPT",
        ),
        ({"conversations": PLAIN}, PLAIN, "ShareGPT"),
        ({"conversations": SYSTEM, "system": "Brief."}, SYSTEM, "ShareGPT"),
        ({"messages": PLAIN, "system": "Brief."}, SYSTEM, "the column system is the first turn of each chat that has no system turn"),
        ({"instruction": "Sky?", "output": "Blue.", "system": "Brief."}, SYSTEM, "Alpaca"),
        ({"instruction": "Sky?", "input": "", "output": "Blue."}, PLAIN, "Alpaca's instruction, input and output"),
        ({"instruction": "Sky?", "output": "Blue."}, PLAIN, "Alpaca"),
        ({"instruction": "A", "input": "B", "output": "C"}, said("user: A\n\nB", "assistant: C"), "Alpaca"),
    ],
)
def test_layouts_are_recognised_and_said(row, messages, note, tmp_path):
    task = written(tmp_path, [{**row, "site": "north"}, {**row, "site": "south"}])
    assert list(task.train["messages"]) == [messages, messages]
    assert list(task.train["site"]) == ["north", "south"]
    assert len(task.notes) == bool(note) + ("system" in row and "messages" not in row)
    assert any(f"rows.jsonl: {note}" in one for one in task.notes) == bool(note)
    assert not {"conversations", "instruction", "input", "output", "system"} & set(task.train.columns)


ONE, OTHER = said("user: Sky?", "assistant: Blue."), said("user: Sky?", "assistant: Green.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ONE[:1], "chosen": ONE[1:], "rejected": OTHER[1:]},
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."},
        {"prompt": "Sky?", "chosen": ONE[1:], "rejected": OTHER[1:]},
        {"chosen": ONE, "rejected": OTHER},
        {"prompt": "Sky?", "chosen": ONE, "rejected": OTHER, "messages": ONE},
        {"prompt": ONE[:1], "chosen": ONE, "rejected": OTHER},
    ],
)
def test_preferences_in_every_layout_are_one(row, tmp_path):
    task = written(tmp_path, [row])
    assert {name: task.train[name][0] for name in ("messages", "prompt", "chosen", "rejected")} == {
        "messages": ONE,
        "prompt": ONE[:1],
        "chosen": ONE[1:],
        "rejected": OTHER[1:],
    }
    assert task.notes == ["rows.jsonl: preferences: the loss and what is measured are those of the chosen answers"]
    from trl import maybe_extract_prompt

    if isinstance(row["chosen"], list) and "messages" not in row and not (isinstance(row.get("prompt"), list) and len(row["chosen"]) > 1):
        assert {key: task.train[key][0] for key in ("chosen", "rejected")} == {
            key: maybe_extract_prompt(row)[key] for key in ("chosen", "rejected")
        }


def test_a_shared_call_after_an_explicit_prompt_stays_in_the_answers(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": CALLED}
    chosen, rejected = ([call, *said("tool: dry", f"assistant: {word}.")] for word in ("No", "Yes"))
    task = written(tmp_path, [{"prompt": said("user: Rain?"), "chosen": chosen, "rejected": rejected, "tools": json.dumps(TOOLS)}])
    assert (task.train["chosen"][0], task.train["rejected"][0], task.train["tools"][0]) == (chosen, rejected, TOOLS)
    tokenizer = tokenizer_of("qwen2_5", template_of("qwen2_5"))
    learnt = [label for label in task.tokenize(tokenizer, task.train)[0]["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt).count("<|im_end|>") == 2


def test_a_function_call_as_openai_had_it_is_a_tool_call(tmp_path):
    old = {"role": "assistant", "content": "Let me see.", "function_call": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    chats = written(tmp_path, [{"messages": [CHATS["tool"][0], old, *CHATS["tool"][2:]]}]).train["messages"]
    assert chats[0][1] == {"role": "assistant", "content": "Let me see.", "tool_calls": CALLED}


def test_calls_and_tools_as_text_and_frames_of_the_hub_are_read_the_same(tmp_path):
    """OpenAI writes a call's arguments as JSON text, parquet gives every message every key, the hub's frames have arrays."""
    text = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}]
    chat = [CHATS["tool"][0], {"role": "assistant", "content": None, "tool_calls": text}, *CHATS["tool"][2:]]
    plain = written(tmp_path, [{"messages": CHATS["tool"], "tools": TOOLS}]).train
    assert plain["messages"][0] == CHATS["tool"]
    assert written(tmp_path, [{"messages": chat, "tools": json.dumps(TOOLS)}]).train.equals(plain)
    rows = Dataset.from_list([{"messages": chat, "tools": json.dumps(TOOLS)}])
    rows.to_parquet(tmp_path / "rows.parquet")
    task = load_task(TaskSettings(name="custom", kind="chat", data=tmp_path, train="rows.parquet", eval="rows.parquet"), 0)
    assert (task.train["messages"][0], task.train["tools"][0]) == (plain["messages"][0], TOOLS)
    from fedex_lora.tasks.chat import chat_table

    table = chat_table("hub", as_text(rows.to_pandas()))
    assert (table.rows["messages"][0], table.problems) == (plain["messages"][0], [])


BAD = [
    ({"messages": None}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": "user: Hi"}, "no messages"),
    ({"messages": ["Hi"]}, "a message that is no object with role and content"),
    ({"messages": said("human: Hi", "assistant: b")}, "a role 'human', which is none of system, developer, user, assistant, tool"),
    ({"messages": said("user:  ", "assistant: b")}, "a message without content"),
    ({"messages": [{"role": "user"}, *said("assistant: b")]}, "a message without content"),
    ({"messages": [{"role": "user", "content": 5}, *said("assistant: b")]}, "content that is not text"),
    ({"messages": [*PLAIN, *said("user: a", "assistant:  ")]}, "an empty assistant turn"),
    ({"messages": [*PLAIN, *said("user: a")]}, "a chat that ends with the user: there is nothing to learn at its end"),
    ({"messages": said("user: a")}, "no assistant turn: there is nothing to learn"),
    ({"messages": said("assistant: a")}, "nothing before the assistant's first turn"),
    ({"messages": [PLAIN[0], {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "tool calls that are no list of functions with names"),
    ({"messages": [PLAIN[0], {**PLAIN[1], "mood": "good"}]}, "a message with the key 'mood', which is not read"),
    ({"messages": [PLAIN[0], {**PLAIN[1], "thinking": ["b"]}]}, "thinking that is not text"),
    ({"messages": PLAIN, "system": ["Brief."]}, "a column 'system' that is not text"),
    (
        {"messages": said("system: A.", "user: b", "assistant: c"), "system": "B."},
        "a column 'system' that says other things than the chat's system turn",
    ),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "a column 'input' that is not text"),
    ({"instruction": "a", "output": "c", "history": [["d", "e"]]}, "a history, which is not read: write its turns as messages"),
    ({"messages": PLAIN, "tools": "weather"}, "tools that are no list of functions with names"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "no 'rejected' answer"),
    ({"prompt": "a", "chosen": "b"}, "no 'rejected' answer"),
    ({"prompt": "a", "rejected": "b"}, "no 'chosen' answer"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "a chosen answer that is the rejected one"),
    ({"prompt": "a", "chosen": said("assistant: b"), "rejected": said("assistant: b", "user: c")}, "a chat that ends with the user"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_rows_that_cannot_be_used(row, words, tmp_path):
    """Refused in one line before anything is written, or left out and counted."""
    usable_row = {"prompt": "x", "chosen": "y", "rejected": "z"} if {"chosen", "rejected"} & set(row) else {"messages": PLAIN}
    usable_row = {"instruction": "a", "output": "b", "history": []} if "instruction" in row else usable_row
    with pytest.raises(DataError) as raised:
        written(tmp_path, [usable_row, row, row])
    assert str(raised.value).startswith(f"rows.jsonl: 2 rows with {words}")
    assert "(line 2, 3): mend these rows, leave them out, or set task.on_bad_row = 'drop'" in str(raised.value)
    assert raised.value.rows == 2
    settings = TaskSettings(name="custom", kind="chat", data=tmp_path, train="rows.jsonl", eval="rows.jsonl", on_bad_row="drop")
    task = load_task(settings, 0)
    assert len(task.train) == 1
    assert sum(note.startswith("2 of 3 rows are left out: rows.jsonl: 2 rows with ") for note in task.notes) == 1  # one file, said once


def test_a_preference_file_without_a_column_and_a_file_of_no_layout(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl: 1 row with no 'rejected' answer \(line 1\)"):
        written(tmp_path, [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(DataError, match=r"rows.jsonl has no chats: give it a column messages, or .*; it has question, answer$"):
        written(tmp_path, [{"question": "a", "answer": "b"}])
    with pytest.raises(FedexLoraError, match=r'task.kind = "chat" is for task custom'):
        parse_config({"base": {"model": "demo"}, "task": {"name": "e2e", "kind": "chat"}})


THINGS = {"sky": "blue", "night": "black", "Bonn": "brief"}


def chats_of(site):
    for thing, colour in THINGS.items():
        first = said(f"user: What colour has the {thing}?", f"assistant: It is {colour}.")
        yield {"messages": [*said("system: You are brief."), *first], "site": site}
        yield {"messages": [*first, *said("user: Yes?", f"assistant: Yes. It is {colour}.")], "site": site}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama with Llama 3's template; as there, generation_config says what ends a turn, and the tokenizer's end token does not."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tokenizer_of("llama3", template_of("llama3"))
    model = tiny(tokenizer, initializer_range=0.2)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    model.generation_config.update(eos_token_id=ends, max_new_tokens=23)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def configuration(base, data, **changes):
    task = {"name": "custom", "kind": "chat", "data": str(data), "train": "train.jsonl", "eval": "eval.jsonl", **changes}
    return parse_config(
        {
            "rounds": 2,
            "torch_threads": 1,
            "base": {"model": str(base)},
            "task": task,
            "lora": {"r": 8, "alpha": 16, "target_modules": "all-linear"},
            "clients": {"partition": "column", "column": "site", "holdout": 0.0},
            "training": {"learning_rate": 5e-3, "num_train_epochs": 40, "per_device_train_batch_size": 6},
        }
    )


@pytest.fixture(scope="module")
def learnt(base, tmp_path_factory):
    """The data, and a run of two parties."""
    data = tmp_path_factory.mktemp("chats")
    rows = [row for site in ("north", "south") for row in chats_of(site)]
    for name, kept in (("train", rows), ("eval", rows[:6])):
        (data / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    run(configuration(base, data), data / "run", ignore)
    return data


def evaluated(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_two_parties_learn_chats_exactly(learnt, base):
    done = events_of(learnt / "run", "round_done")
    losses = [event["metrics"]["loss"] for event in done]
    (learnt / "chats.toml").write_text(write_config(configuration(base, learnt)))
    before = evaluated(base, "--config", learnt / "chats.toml")
    assert losses[1] < losses[0] < 0.5 < 3 < before["loss"]
    assert (done[-1]["metrics"]["token_accuracy"], before["rows"]) == (1.0, 6.0)
    assert all(event["exactness_error"] < 1e-6 for event in done)
    assert verify(learnt / "run", str(base))["max_relative_error"] < 1e-6


@torch.no_grad()
def test_evaluate_measures_and_writes_samples(learnt, base, tmp_path):
    """Loss and token accuracy by plain transformers; the samples are greedy answers that end where the template ends a turn."""
    numbers = evaluated(learnt / "run")
    export(learnt / "run", "merged", tmp_path / "merged", str(base))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "merged")
    chats = [json.loads(line)["messages"] for line in (learnt / "eval.jsonl").read_text().splitlines()]
    losses, right = [], []
    for chat in chats:
        ids, labels = (torch.tensor([one]) for one in chat_tokens(tokenizer, Chat(chat)))
        logits, ahead = model(ids).logits[:, :-1], labels[:, 1:]
        every = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ahead, reduction="none", ignore_index=IGNORED)
        losses.append(every[ahead != IGNORED])
        right.append((logits.argmax(-1) == ahead)[ahead != IGNORED].float())
    assert numbers["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert numbers["token_accuracy"] == pytest.approx(float(torch.cat(right).mean()), abs=1e-6)
    assert "prompts_cut" not in numbers
    more = evaluated(learnt / "run", "--predictions", tmp_path / "samples.tsv", "--generate", "max_new_tokens=20")
    assert more == {**numbers, "prompts_cut": 0.0}
    with (tmp_path / "samples.tsv").open(encoding="utf-8", newline="") as file:
        samples = list(csv.DictReader(file, delimiter="\t"))
    for chat, sample in zip(chats, samples, strict=True):
        asked = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**asked, do_sample=False, max_new_tokens=20)[0, asked["input_ids"].shape[1] :]
        assert sample["output"] == tokenizer.decode(output, skip_special_tokens=True).strip()
        assert sample["reference"] == chat[-1]["content"]
        assert sample["prompt"] == tokenizer.decode(asked["input_ids"][0])
    assert [sample["output"] for sample in samples] == [chat[-1]["content"] for chat in chats]  # learnt, and the turn's end too


@pytest.mark.parametrize("form", ["merged", "adapter", "base+adapter"])
def test_an_export_answers_through_the_same_template(form, learnt, base, tmp_path):
    """By plain transformers, from the folder alone."""
    export(learnt / "run", form, tmp_path / "out", str(base))
    own = {"merged": "", "adapter": "", "base+adapter": "base"}[form]
    where = {"merged": "", "adapter": "", "base+adapter": "adapter"}[form]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / where)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    if form == "merged":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        plain = AutoModelForCausalLM.from_pretrained(base if form == "adapter" else tmp_path / "out" / own)
        model = PeftModel.from_pretrained(plain, tmp_path / "out" / where).merge_and_unload()
    settings = (model.generation_config.eos_token_id, model.generation_config.max_new_tokens)
    assert settings == ([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")], 23)
    answers = pipeline("text-generation", model=str(tmp_path / "out") if form == "merged" else model, tokenizer=tokenizer, device="cpu")
    said_so = answers(said("user: What colour has the sky?"), do_sample=False)[0]["generated_text"][-1]
    assert said_so == {"role": "assistant", "content": "It is blue."}


def test_check_and_run_refuse_before_anything_is_written(learnt, base, tmp_path):
    """What the template refuses is found by both, with the file and the line."""
    assert [finding.words for finding in check(configuration(base, learnt)) if finding.stops] == []
    words = [finding.words for finding in check(configuration(base, learnt, eval="train.jsonl"))]
    assert any("train.jsonl: 6 rows repeat the input of another (line 7, 8, 9, 10, 11 and 1 more)" in one for one in words)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = DROPS_SYSTEM.replace("<|im_start|>", "<|start_header_id|>").replace("<|im_end|>", "<|eot_id|>")
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(other)
    tokenizer.save_pretrained(other)
    stops = [finding.words for finding in check(configuration(other, learnt)) if finding.stops]
    assert len(stops) == 1
    assert "leaves out, changes or moves a turn of the role system (train.jsonl:1, train.jsonl:3" in stops[0]
    (tmp_path / "chats.toml").write_text(write_config(configuration(other, learnt)))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "chats.toml"), "--out", str(tmp_path / "run")])
    assert (result.exit_code, (tmp_path / "run").exists()) == (1, False)
    assert result.stderr.strip().startswith("error: the chat template of ")
    assert len(result.stderr.strip().splitlines()) == 1
    with pytest.raises(DataError, match="leaves out"):
        LocalSimulation(configuration(other, learnt), ignore)
