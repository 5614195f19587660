"""Synthetic tokenizers and hand-written twins of chat templates.

A twin builds the rendered text from segments that say which characters are trained, so it is an oracle for both text and mask.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello to the user",
    "What is 2+2? It is 4. Question: user assistant system model",
    "Answer the question. Think first, then answer; it is the answer.\n\nA new line\n",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n USER: ASSISTANT: Q: A:",
] * 3

SPECIALS = (
    "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST] <start_of_turn> <end_of_turn> <|user|> "
    "<|assistant|> <|system|> <|end|> <｜User｜> <｜Assistant｜> <|START_OF_TURN|> <|USER|> <|CHATBOT|> <|END_RESPONSE|> <|END_OF_TURN|> "
    "[gMASK] <|start|> <|channel|> <|message|> <|return|>"
).split()


class Variant(NamedTuple):
    """How a synthetic tokenizer differs from the others."""

    kind: str  # byte, byte_prefix_space, meta_first, meta_always, llama2, words
    bos: str | None = "<s>"
    eos: str = "</s>"
    pad: str | None = "<pad>"
    adds_bos: bool = False
    adds_eos: bool = False
    specials: bool = True  # the templates' own tokens are special; else they are plain text
    rstrip: bool = False
    lstrip: bool = False
    trim: bool = False  # byte-level offsets leave spaces out
    marked: bool = True  # added tokens carry the special flag
    regex: bool = True  # byte-level tokens end where words do; else they may end in spaces


VARIANTS = {
    "byte": Variant("byte"),
    "byte_no_bos": Variant("byte", bos=None),
    "byte_adds_bos": Variant("byte", adds_bos=True),
    "byte_adds_both": Variant("byte", adds_bos=True, adds_eos=True),
    "byte_pad_is_eos": Variant("byte", pad="</s>"),
    "byte_bos_is_eos": Variant("byte", bos="</s>", pad="</s>"),
    "byte_bos_is_eos_added": Variant("byte", bos="</s>", pad="</s>", adds_bos=True),
    "byte_no_pad": Variant("byte", pad=None),
    "byte_trim": Variant("byte", trim=True),
    "byte_trim_prefix_space": Variant("byte_prefix_space", trim=True, pad="</s>"),
    "byte_trim_across_words": Variant("byte", trim=True, regex=False),
    "byte_plain_across_words": Variant("byte", trim=True, regex=False, specials=False),
    "byte_prefix_space": Variant("byte_prefix_space", adds_bos=True),
    "byte_rstrip": Variant("byte", rstrip=True),
    "byte_lstrip": Variant("byte", lstrip=True),
    "byte_plain": Variant("byte", specials=False),
    "byte_plain_trim": Variant("byte", specials=False, trim=True, pad="</s>"),
    "byte_unmarked": Variant("byte", marked=False),
    "meta_first": Variant("meta_first", adds_bos=True),
    "meta_always": Variant("meta_always", adds_bos=True, pad="</s>"),
    "meta_plain": Variant("meta_first", specials=False),
    "llama2": Variant("llama2", adds_bos=True, pad=None),
    "words": Variant("words"),
    "words_bos": Variant("words", adds_bos=True, pad="</s>"),
}


def build(variant: Variant) -> PreTrainedTokenizerFast:
    core = Tokenizer(
        models.WordLevel({"[UNK]": 0}, "[UNK]") if variant.kind == "words" else models.BPE(byte_fallback=variant.kind != "byte")
    )
    byte_level = variant.kind.startswith("byte")
    if byte_level:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=variant.kind == "byte_prefix_space", use_regex=variant.regex)
        core.decoder = decoders.ByteLevel()
    elif variant.kind == "words":
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    elif variant.kind == "llama2":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=variant.kind.removeprefix("meta_"))
        core.decoder = decoders.Metaspace(prepend_scheme=variant.kind.removeprefix("meta_"))
    base = ["[UNK]", "<s>", "</s>", "<pad>"]
    if variant.kind == "words":
        trainer = trainers.WordLevelTrainer(special_tokens=base, vocab_size=400)
    else:
        letters = pre_tokenizers.ByteLevel.alphabet() if byte_level else [*map(chr, range(32, 127)), "\n", "▁", "é", "日"]
        extra = [] if byte_level else [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=base + extra, initial_alphabet=list(letters), show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    if byte_level:
        core.post_processor = processors.ByteLevel(trim_offsets=variant.trim)
    return _dress(core, variant)


def _dress(core: Tokenizer, variant: Variant) -> PreTrainedTokenizerFast:
    if variant.adds_bos or variant.adds_eos:
        single = f"{variant.bos} $A" if variant.adds_bos else "$A"
        single += f" {variant.eos}" if variant.adds_eos else ""
        ends = [(token, core.token_to_id(token)) for token in {variant.bos, variant.eos} if token]
        template = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=ends)
        core.post_processor = processors.Sequence([core.post_processor, template]) if core.post_processor else template
    names = {"bos_token": variant.bos, "eos_token": variant.eos, "pad_token": variant.pad, "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{key: value for key, value in names.items() if value})
    if variant.specials:
        added = [
            AddedToken(token, rstrip=variant.rstrip, lstrip=variant.lstrip, special=variant.marked, normalized=False) for token in SPECIALS
        ]
        tokenizer.add_tokens(added, special_tokens=variant.marked)
    return tokenizer


@cache
def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    return build(VARIANTS[name])


@pytest.fixture
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Tokenizer of a variant by name, shared: set chat_template anew in each test."""
    return _tokenizer


@pytest.fixture
def variants() -> dict[str, Variant]:
    return VARIANTS


@pytest.fixture
def build_tokenizer() -> Callable[[Variant], PreTrainedTokenizerFast]:
    return build


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with <s>, </s>, <pad>, chatml."""
    made = _tokenizer("byte")
    made.chat_template = TEMPLATES["chatml"]
    return made


@pytest.fixture
def templates() -> dict[str, str]:
    return TEMPLATES


@pytest.fixture
def twins() -> dict[str, Callable]:
    return TWINS


TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "default_system": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
        "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}"
        "{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}"
        "{% for m in loop_messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "qwen3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
        "{% set content = m.content %}{% set reasoning = '' %}"
        "{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
        "{% elif '</think>' in content %}"
        "{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
        "{% if loop.index0 > ns.last %}{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    ),
    "deepseek": (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}"
        "{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
    "cohere": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN|>' }}{% if m['role'] == 'assistant' %}"
        "{{ '<|CHATBOT|>' + m['content'] + '<|END_RESPONSE|>' }}{% else %}{{ '<|USER|>' + m['content'] }}{% endif %}{{ '<|END_OF_TURN|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN|><|CHATBOT|>' }}{% endif %}"
    ),
    "glm": (
        "[gMASK]{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'].strip() }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "channels": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}"
        "{{ '<|channel|>final<|message|>' + m['content'] + ('<|return|>' if loop.last else '<|end|>') }}"
        "{% else %}{{ '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
        "{% else %}{{ 'USER: ' + m['content'] + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}

OFF, ON, CLOSE = 0, 1, 2  # not trained, trained, trained and closing the turn: kept even when a blank behind it is in the same token


def _chatml(messages, bos, eos, default=False):
    if default and messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou are helpful<|im_end|>\n", OFF
    for m in messages:
        yield f"<|im_start|>{m['role']}\n", OFF
        yield from _said(m, m["content"], "<|im_end|>")
        yield "\n", OFF


def _said(m, content, close, before=""):
    spoken = m["role"] == "assistant"
    yield before, ON if spoken else OFF
    yield content, ON if spoken else OFF
    yield close, CLOSE if spoken else OFF


def _llama3(messages, bos, eos):
    yield bos, OFF
    for m in messages:
        yield f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", OFF
        yield from _said(m, m["content"].strip(), "<|eot_id|>")


def _llama2(messages, bos, eos):
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    for i, m in enumerate(messages[system is not None :]):
        if m["role"] == "user":
            inner = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None and i == 0 else ""
            yield f"{bos}[INST] {inner}{m['content'].strip()} [/INST]", OFF
        else:
            yield from _said(m, m["content"].strip(), f" {eos}", before=" ")


def _mistral(messages, bos, eos):
    yield bos, OFF
    for m in messages:
        if m["role"] == "user":
            yield f"[INST] {m['content']}[/INST]", OFF
        else:
            yield from _said(m, m["content"], eos, before=" ")


def _gemma(messages, bos, eos):
    yield bos, OFF
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    for i, m in enumerate(messages[system is not None :]):
        yield f"<start_of_turn>{'model' if m['role'] == 'assistant' else m['role']}\n", OFF
        yield f"{system}\n\n" if system is not None and i == 0 else "", OFF
        yield from _said(m, m["content"].strip(), "<end_of_turn>")
        yield "\n", OFF


def _phi3(messages, bos, eos):
    for m in messages:
        yield f"<|{m['role']}|>\n", OFF
        yield from _said(m, m["content"], "<|end|>")
        yield "\n", OFF
    yield eos, OFF


def _zephyr(messages, bos, eos):
    for m in messages:
        yield f"<|{m['role']}|>\n", OFF
        yield from _said(m, m["content"], eos)
        yield "\n", OFF


def _qwen3(messages, bos, eos):
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        content, before = m["content"], ""
        if m["role"] == "assistant":
            reasoning = content.split("</think>")[0].split("<think>")[-1].strip("\n") if "</think>" in content else ""
            content = content.split("</think>")[-1].lstrip("\n") if "</think>" in content else content
            if i > last:
                before, content = f"<think>\n{reasoning}\n</think>\n\n", content.lstrip("\n")
        yield f"<|im_start|>{m['role']}\n", OFF
        yield from _said(m, content, "<|im_end|>", before)
        yield "\n", OFF


def _deepseek(messages, bos, eos):
    yield bos + "".join(m["content"] for m in messages if m["role"] == "system"), OFF
    for m in messages:
        if m["role"] == "user":
            yield "<｜User｜>" + m["content"], OFF
        elif m["role"] == "assistant":
            yield "<｜Assistant｜>", OFF
            yield from _said(m, m["content"].rpartition("</think>")[2], eos)


def _cohere(messages, bos, eos):
    yield bos, OFF
    for m in messages:
        spoken = m["role"] == "assistant"
        yield "<|START_OF_TURN|>" + ("<|CHATBOT|>" if spoken else "<|USER|>"), OFF
        yield from _said(m, m["content"], "<|END_RESPONSE|>" * spoken + "<|END_OF_TURN|>")


def _glm(messages, bos, eos):
    yield "[gMASK]", OFF
    for i, m in enumerate(messages):
        closes = i > 0 and messages[i - 1]["role"] == "assistant"
        yield f"<|{m['role']}|>", CLOSE if closes else OFF
        yield from _said(m, m["content"].strip(), "", before="\n")
    if messages[-1]["role"] == "assistant":  # not in the template's text: the header of the next turn is what ends this one
        yield "<|user|>", CLOSE


def _channels(messages, bos, eos):
    for i, m in enumerate(messages):
        spoken = m["role"] == "assistant"
        yield f"<|start|>{m['role']}", OFF
        close = "<|return|>" if spoken and i + 1 == len(messages) else "<|end|>"
        yield from _said(m, m["content"], close, before="<|channel|>final<|message|>" if spoken else "<|message|>")


def _vicuna(messages, bos, eos):
    for m in messages:
        if m["role"] == "assistant":
            yield "ASSISTANT:", OFF
            yield from _said(m, m["content"], eos, before=" ")
        else:
            yield f"USER: {m['content']} ", OFF


TWINS = {
    "chatml": _chatml,
    "default_system": lambda messages, bos, eos: _chatml(messages, bos, eos, default=True),
    "llama3": _llama3,
    "llama2": _llama2,
    "mistral": _mistral,
    "gemma": _gemma,
    "phi3": _phi3,
    "zephyr": _zephyr,
    "qwen3": _qwen3,
    "deepseek": _deepseek,
    "cohere": _cohere,
    "glm": _glm,
    "channels": _channels,
    "vicuna": _vicuna,
}
