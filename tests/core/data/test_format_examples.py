"""Every row format has an example file; here each is read, rendered and compared with what is written out below."""

import json
from pathlib import Path

import numpy as np
import pytest

from treetune.core.data import (
    custom,
    ebft,
    formats,
    instruction,
    kinds,
    pack,
    preference,
    pretokenised,
    prompt_completion,
    prompts,
    pygmalion,
    reward,
    row_formats,
    segments,
    sources,
    spans,
    trees,
    unpaired,
)

FOLDER = Path(__file__).parents[3] / "examples" / "data" / "formats"
HEAD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
BARE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TASK = "### Instruction:\nName a colour.\n\n### Input:\nIt is the colour of grass.\n\n### Response:\n"
SAID = "USER: Name a colour.\nIt is the colour of grass.\nASSISTANT:"
CHOICE = 'USER: Which one is a fruit?\n- "a pear"\n- "a stone"\nASSISTANT:'
MILL = "Use the following contextual information to concisely answer the question.\n\nUSER: The mill was built in 1820.\n===\n"
EVALUATION = (
    "scores:\n  refusal: 10\n  creativity: 4\ncritiques:\n  refusal:\n    explanation: It answers.\n    improvements: None.\n"
    "  creativity:\n    explanation: It is plain.\n    improvements: Add a picture.\n"
)
RATED = "Question: Describe snow.\nAnswer: Snow is cold."
SNOW = "Snow falls like quiet feathers."

# format -> (text before the response, response) of its first row
INSTRUCTIONS = {
    "alpaca": (f"{HEAD}\n\n{TASK}", "Green."),
    "alpaca:chat": (f"{HEAD}\n\n{SAID}", "Green."),
    "alpaca_chat": (f"{HEAD}\n\n{SAID}", "Green."),
    "alpaca_chat.load_qa": (f"{BARE}\n\nUSER: How many legs has a spider?\nASSISTANT:", "Eight."),
    "alpaca_chat.load_concise": (f"{instruction.CONCISE}\n\n{SAID}", "Green."),
    "alpaca_chat.load_camel_ai": (f"{BARE}\n\nUSER: What is ice?\nASSISTANT:", "Frozen water."),
    "alpaca_w_system.load_open_orca": ("### System:\nBe brief.\n### Human:\nWhat is ice?\n### Assistant:\n", "Frozen water."),
    "gpteacher": (f"{HEAD}\n\n{TASK}", "Green."),
    "gpteacher:chat": (f"{HEAD}\n\n{SAID}", "Green."),
    "oasst": (f"{BARE}\n\n### Instruction:\nWhat is ice?\n\n### Response:\n", "Frozen water."),
    "reflection": (
        f"{HEAD}{instruction.REFLECT}\n\n{TASK}",
        "### Thought:\nBlue.\n\n### Agent Reflection:\nGrass is not blue.\n\n### Final Response:\nGreen.",
    ),
    "reflection_ac": (f"{HEAD}{instruction.REFLECT}\n\n{SAID}", " Blue.\nASSISTANT REFLECTION: Grass is not blue.\nASSISTANT: Green."),
    "jeopardy": (
        "Below is a Jeopardy clue paired with its category. Write a concise response that best answers the clue.\n\n"
        "### Instruction:\nIt has eight legs.\n\n### Input:\nAnimals\n\n### Response:\n",
        "what is a spider",
    ),
    "explainchoice": (
        f"Choose the answer that best answers the question. Explain your reasoning.\n\n{CHOICE}",
        "A pear grows on a tree and is eaten, so it is a pear.",
    ),
    "concisechoice": (f"Choose the answer that best answers the question. Be concise in your response.\n\n{CHOICE}", "a pear"),
    "summarizetldr": (
        "USER: Summarize the following article as a TL;DR.\nThe bridge was closed for a week while its bolts were changed.\nASSISTANT:",
        "Bridge closed for repairs.",
    ),
    "context_qa": (f"{MILL}When was the mill built?\nASSISTANT:", "In 1820."),
    "context_qa.load_v2": ("Context: The mill was built in 1820.\nQuestion: When was the mill built?\n", "Answer: In 1820."),
    "context_qa.load_404": (f"{MILL}Who owns the mill?\nASSISTANT:", instruction.UNKNOWN),
    "creative_acr.load_answer": (f"{instruction.CREATIVE}\n\nUSER: Describe snow.\nASSISTANT:", SNOW),
    "creative_acr.load_critique": (f"USER: {instruction.CRITIQUE}\n\n{RATED}\nASSISTANT:", EVALUATION),
    "creative_acr.load_revise": (f"USER: {instruction.REVISE}\n\n{RATED}\nEvaluation:\n{EVALUATION}ASSISTANT:", SNOW),
    "metharme": ("<|user|>What is ice?<|model|>", "Frozen water.</s></s>"),
}

CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is ice?<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat is ice?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GOOD, BAD = "Frozen water.", "A kind of stone."


def without_system(text):
    return text.replace("<|im_start|>system\nBe brief.<|im_end|>\n", "").replace(
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", ""
    )


STYLED = {"chatml": (CHATML, "<|im_end|>"), "llama3": (LLAMA3, "<|eot_id|>")}
PLAIN = ("argilla_chat", "intel", "prompt_pairs")  # of the pairs: rows without a system text
# file -> (prompt, [trained text of each branch]) of its first row
PAIRS = {
    f"dpo.{style}.{name}": (without_system(text) if name in PLAIN else text, [GOOD + end, BAD + end])
    for style, (text, end) in STYLED.items()
    for name in preference.PAIR_COLUMNS
} | {
    "dpo.zephyr.nectar": ("<|system|>\n</s>\n<|user|>\nWhat is ice?</s>\n<|assistant|>\n", [GOOD + "</s>", BAD + "</s>"]),
    "dpo.chat_template.default": (CHATML, [GOOD + "<|im_end|>", BAD + "<|im_end|>"]),
    "dpo.chat_template.argilla_chat": (without_system(CHATML), [GOOD + "<|im_end|>", BAD + "<|im_end|>"]),
    "dpo.user_defined.default": ("What is ice?", [GOOD + "</s>", BAD + "</s>"]),
    "dpo.passthrough": ("What is ice?\n", [GOOD + "</s>", BAD + "</s>"]),
    "orpo.chat_template.argilla": (CHATML, [GOOD + "<|im_end|>", BAD + "<|im_end|>"]),
    "bradley_terry.chat_template": (CHATML, [GOOD + "<|im_end|>", BAD + "<|im_end|>"]),
    "bradley_terry.llama3": (LLAMA3, [GOOD + "<|eot_id|>", BAD + "<|eot_id|>"]),
}
UNPAIRED = {
    f"kto.{style}.{name}": (without_system(text) if name in ("argilla_chat", "prompt_pairs") else text, [GOOD + end])
    for style, (text, end) in STYLED.items()
    for name in (*unpaired.FIELDS, "argilla_chat")
} | {"kto.user_defined.default": ("What is ice?", [GOOD + "</s>"]), "kto.passthrough": ("What is ice?\n", [GOOD + "</s>"])}
STRIDED = {
    "ebft_pretrain.transform": ("", "Rain fell on the quiet town.</s>"),
    "ebft_strided_structured.transform": ("Write a function that doubles a number.\n", "def double(x):\n    return 2 * x\n"),
    "ebft_strided_chat.transform": (without_system(CHATML), "Frozen water.<|im_end|>Hot water in the air.<|im_end|>"),
    "ebft_reasoning.transform_strided": (
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n",
        "<think>Add them.</think>\n\n5<|im_end|>",
    ),
}
QUESTION, ICE, STEAM = ({"role": "user", "content": text} for text in ("What is 2 + 3?", "What is ice?", "And steam?"))
TALK = [ICE, {"role": "assistant", "content": GOOD}, STEAM, {"role": "assistant", "content": "Hot water in the air."}]
STRUCTURED = {
    "ebft_opencode.transform": [
        ([{"role": "user", "content": "Write a function that doubles a number."}], "def double(x):\n    return 2 * x\n")
    ],
    "ebft_chat_multiturn.transform": [(TALK[:1], GOOD)],
    "ebft_chat_multiturn.transform_last_turn": [(TALK[:3], "Hot water in the air.")],
    "ebft_chat_multiturn.transform_all_turns": [(TALK[:1], GOOD), (TALK[:3], "Hot water in the air.")],
    "ebft_reasoning.transform": [([QUESTION], "<think>Add them.</think>\n\n5")],
    "ebft_reasoning.transform_answer_only": [([QUESTION], "5")],
    "ebft_reasoning.transform_split_thinking": [([QUESTION | {"reasoning_content": ""}], "<think>\nAdd them.\n</think>\n\n5")],
}
OTHERS = (
    "user_defined", "input_output", "pygmalion", "pretokenised", "prompt_completion", "completion", "stepwise_supervised", "grpo", "custom",
)  # fmt: skip


def example(name):
    return sources.read(str(FOLDER / f"{name.replace(':', '-')}.jsonl"))


def text_of(tokens, tokenizer):
    return tokenizer.decode(tokens, skip_special_tokens=False)


def halves(tokens, weight, tokenizer):
    """(text before the first trained token, text of the trained tokens)."""
    first = int(np.flatnonzero(weight)[0])
    return text_of(tokens[:first], tokenizer), text_of(tokens[weight > 0], tokenizer)


def encoded(read, rows, tokenizer):
    return spans.encode(read(rows), tokenizer, spans.read_special_tokens(tokenizer))


def form(name):
    family, _, rest = name.partition(".")
    kinds = {"dpo": "pairs", "orpo": "pairs", "kto": "unpaired", "bradley_terry": "ranked"}
    return row_formats.of_kind(kinds[family])[name if family == "bradley_terry" else rest]


def test_every_format_has_an_example_and_every_example_a_format():
    wanted = {name.replace(":", "-") for name in (*INSTRUCTIONS, *PAIRS, *UNPAIRED, *STRIDED, *STRUCTURED, *OTHERS)}
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == wanted
    assert set(INSTRUCTIONS) == set(instruction.SHAPES)
    pairs, ranked = (set(row_formats.of_kind(kind)) for kind in ("pairs", "ranked"))
    named = {f"dpo.{name}" for name in pairs} - {"dpo.chat_template.argilla"} | {"orpo.chat_template.argilla"} | ranked - pairs
    assert named == set(PAIRS) and {f"kto.{name}" for name in row_formats.of_kind("unpaired")} == set(UNPAIRED)
    assert set(STRIDED) | {"pretokenised"} == set(row_formats.of_kind("strided"))
    assert set(STRUCTURED) == {name for name in row_formats.of_kind("truths") if "." in name}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(name, tokenizer):
    rows = example(name)
    assert set(instruction.columns(name)) <= set(rows.rows[0])
    part = encoded(instruction.shape_reader(name)(tokenizer), rows, tokenizer)
    before, response = INSTRUCTIONS[name]
    assert halves(part[0].tokens, part[0].weight, tokenizer) == (before, response + "</s>")
    everything = encoded(instruction.shape_reader(name)(tokenizer, train_on_inputs=True), rows, tokenizer)[0]
    assert everything.tokens.tolist() == part[0].tokens.tolist() and everything.weight[1:].all()


def test_a_prompt_without_input(tokenizer):
    part = encoded(instruction.reader(tokenizer), example("alpaca"), tokenizer)[1]
    assert halves(part.tokens, part.weight, tokenizer) == (f"{BARE}\n\n### Instruction:\nName a fruit.\n\n### Response:\n", "A pear.</s>")


def test_user_defined(tokenizer):
    options = {"field_system": "sys", "field_instruction": "ask", "field_input": "hint", "field_output": "say"}
    wording = {"format": "[INST] {instruction} ({input}) [/INST]\n", "no_input_format": "[INST] {instruction} [/INST]\n"}
    read = instruction.user_defined(tokenizer, **options, **wording, system_format="{system}\n", system_prompt="Answer.")
    parts = encoded(read, example("user_defined"), tokenizer)
    assert [halves(part.tokens, part.weight, tokenizer) for part in parts] == [
        ("Be brief.\n[INST] Name a colour. (grass) [/INST]\n", "Green.</s>"),
        ("Answer.\n[INST] Name a fruit. [/INST]\n", "A pear.</s>"),
    ]


def test_the_messages_of_a_bot(tokenizer):
    part = encoded(pygmalion.reader(tokenizer), example("pygmalion"), tokenizer)[0]
    before = "<|system|>Persona: Ann is a baker.<|user|> What is fresh?<|model|>"
    assert text_of(part.tokens, tokenizer) == f"{before} Rye bread.</s><|user|> And sweet?<|model|> Buns.</s>"
    assert halves(part.tokens, part.weight, tokenizer) == (before, " Rye bread.</s> Buns.</s>")
    assert part.unclosed == 0, "each message is ended"
    whole = encoded(pygmalion.reader(tokenizer, train_on_inputs=True), example("pygmalion"), tokenizer)[0]
    assert whole.weight.tolist() == [0.0] + [1.0] * (len(part.tokens) - 1)


PYGMALION_ERRORS = {
    "no list": ({"conversations": "hi"}, "field conversations is of type str, expected a list"),
    "no role": ({"conversations": [{"from": "human", "value": "a"}]}, "message 1: field role is None, expected one of system, human, bot"),
    "no text": ({"conversations": [{"role": "bot", "value": 3}]}, "message 1: field value is of type int, expected text"),
    "no message": ({"conversations": ["hi"]}, "message 1 is of type str, expected an object"),
}


@pytest.mark.parametrize("what", PYGMALION_ERRORS)
def test_messages_of_a_bot_that_are_none_are_named(what, tokenizer):
    row, words = PYGMALION_ERRORS[what]
    with pytest.raises(ValueError, match=f"rows row 1.*{words}"):
        pygmalion.reader(tokenizer)(sources.from_list([row]))


STEAM_ASKED = "<|im_end|>\n<|im_start|>user\nAnd steam?<|im_end|>\n<|im_start|>assistant\n"


def test_completions_behind_their_prompts(tokenizer):
    rows = example("prompt_completion")
    read, talks = prompt_completion.reader(tokenizer, chat_template="chatml"), sources.take(rows, [1, 2])
    parts = encoded(read, talks, tokenizer)
    assert [halves(part.tokens, part.weight, tokenizer) for part in parts] == [
        (CHATML, "Frozen water.<|im_end|>"),
        (f"{without_system(CHATML)}Frozen water.{STEAM_ASKED}", "Hot water in the air.<|im_end|>"),
    ], "a turn of the assistant in the prompt is not trained"
    text = encoded(prompt_completion.reader(tokenizer), sources.take(rows, [0]), tokenizer)[0]
    assert halves(text.tokens, text.weight, tokenizer) == ("What is ice?\n", "Frozen water.</s>")
    whole = encoded(prompt_completion.reader(tokenizer, chat_template="chatml", train_on_inputs=True), talks, tokenizer)
    assert all(part.weight[1:].all() for part in whole)
    assert (
        formats.detect(["prompt", "completion"]) == "prompt_completion" and formats.detect(["prompt", "completion", "text"]) == "completion"
    )


PROMPT_ERRORS = {
    "a text and a list": ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, {}, "expected two texts, or two lists"),
    "a template": ({"prompt": "a", "completion": "b"}, {"chat_template": "chatml"}, "chat_template is for messages"),
    "no completion": ({"prompt": "a"}, {}, "completion"),
    "a judgement": ({"prompt": "a", "completion": "b", "label": False}, {}, "label is true or false, so completions are judged"),
    "no message": ({"prompt": ["a"], "completion": [{"role": "assistant", "content": "b"}]}, {}, "message 1 is"),
}


@pytest.mark.parametrize("what", PROMPT_ERRORS)
def test_prompts_and_completions_that_are_none_are_named(what, tokenizer):
    row, options, words = PROMPT_ERRORS[what]
    with pytest.raises(ValueError, match=f"rows row 1.*{words}"):
        prompt_completion.reader(tokenizer, **options)(sources.from_list([row]))


def test_sharegpt_rows_are_chats(tokenizer):
    assert kinds.TEXT.canonical("sharegpt") == "chat"


def test_segments(tokenizer):
    part = encoded(segments.reader(tokenizer), example("input_output"), tokenizer)[0]
    assert text_of(part.tokens, tokenizer) == "<s>Hello\nhi there! goodbye farewell</s>"
    assert halves(part.tokens, part.weight, tokenizer)[1] == "Hello\nhi there! farewell</s>"  # nothing predicts the first token
    whole = encoded(segments.reader(tokenizer, train_on_inputs=True), example("input_output"), tokenizer)[0]
    assert whole.weight.tolist() == [0.0] + [1.0] * (len(part.tokens) - 1)


def test_pretokenised(tokenizer):
    parts = pretokenised.reader(tokenizer)(example("pretokenised"))
    assert [part.tokens.tolist() for part in parts] == [[1, 20, 21, 22, 2], [1, 30, 31, 2]]
    assert [part.weight.tolist() for part in parts] == [[0, 0, 1, 1, 1], [0, 1, 1, 1]]


def test_completion(tokenizer):
    docs, _ = formats.encode_rows(example("completion"), tokenizer)
    assert text_of(docs[0].tokens, tokenizer) == "Rain fell on the quiet town.</s>"


@pytest.mark.parametrize("name", PAIRS | UNPAIRED)
def test_pairs_and_unpaired_rows(name, tokenizer):
    rows = example(name)
    row_format = form(name)
    assert set(row_format.columns[0]) <= set(rows.rows[0]) or name.endswith("argilla_chat")
    docs, report = trees.encode_rows(rows, row_format.reader(), tokenizer, name=name)
    prompt, replies = (PAIRS | UNPAIRED)[name]
    doc = docs[0]
    trunk = doc.tokens[(doc.branch == 0) & (doc.weight == 0)]
    assert text_of(trunk, tokenizer) == prompt
    assert [text_of(doc.tokens[own][doc.weight[own] > 0], tokenizer) for own in trees.branches(doc)] == replies
    assert report.docs == report.rows == len(rows.rows) and not report.dropped
    assert all(doc.weight[own[-1]] == 1 for doc in docs for own in trees.branches(doc))  # every side ends with a trained end
    if name.startswith("kto"):
        assert [doc.extras["desirable"] for doc in docs] == [(row["label"],) for row in rows.rows]
    batch = pack.collate_trees(docs)
    assert batch["row"].tolist() == [doc.row for doc in docs for _ in trees.branches(doc)]


def test_margin(tokenizer):
    docs, _ = trees.encode_rows(example("bradley_terry.chat_template"), reward.ranked, tokenizer)
    batch = pack.collate_trees(docs, read="last")
    assert batch["margin"].tolist() == [0.5, 0.5] and text_of(batch["tokens"][batch["at"]], tokenizer) == "<|im_end|>" * 2


def test_steps(tokenizer):
    docs, _ = reward.encode_steps(example("stepwise_supervised"), row_formats.of_kind("steps")["stepwise_supervised"].reader(), tokenizer)
    batch = pack.collate_trees(docs, read="classes")
    assert text_of(docs[0].tokens, tokenizer) == "What is 2 + 3 * 4?3 * 4 = 12.\n2 + 12 = 15.\n"
    assert batch["targets"].tolist() == [1, 0]
    read = [text_of(docs[0].tokens[: at + 1], tokenizer) for at in batch["at"].tolist()]
    assert read == ["What is 2 + 3 * 4?3 * 4 = 12.\n", "What is 2 + 3 * 4?3 * 4 = 12.\n2 + 12 = 15.\n"]


def test_prompts(tokenizer):
    found, report = prompts.read_prompts(example("grpo"), tokenizer)
    assert [one.text for one in found] == ["<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n", "2 + 3 = "]
    assert [text_of(one.tokens, tokenizer) for one in found] == [one.text for one in found]
    assert [one.columns for one in found] == [{"answer": 5, "topic": "sums"}] * 2 and report.prompts == 2


@pytest.mark.parametrize("name", STRUCTURED)
def test_ebft_structured(name):
    targets, dropped = ebft.read_structured(example(name), row_formats.of_kind("truths")[name].reader)
    assert [(one.prompt, one.ground_truth) for one in targets] == STRUCTURED[name] and not dropped
    rest = example(name).rows[0].get("messages", [])[2:] if name == "ebft_chat_multiturn.transform" else []
    assert list(targets[0].remaining_turns) == rest


@pytest.mark.parametrize("name", STRIDED)
def test_ebft_strided(name, tokenizer):
    doc = row_formats.of_kind("strided")[name].reader(example(name), tokenizer)[0]
    prompt, completion = STRIDED[name]
    if prompt:
        assert halves(doc.tokens, doc.weight, tokenizer) == (prompt, completion)
        assert text_of(doc.tokens[: doc.prompt_length], tokenizer) == prompt
    else:
        assert doc.prompt_length == 0 and text_of(doc.tokens, tokenizer) == completion and doc.weight[1:].all()


@pytest.mark.parametrize("path", ["custom_transform.pairs", "custom_transform.py:pairs"])
def test_custom(path, tokenizer, monkeypatch):
    rows = example("custom")
    monkeypatch.chdir(FOLDER)
    made = custom.apply_transform(rows, custom.load_transform(path), tokenizer)
    assert made.rows == [{"prompt": "What is ice?\n", "chosen": GOOD, "rejected": BAD}] and made.numbers == rows.numbers
    docs, _ = trees.encode_rows(made, preference.passthrough, tokenizer)
    assert len(docs) == 1


def test_examples_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*")) < 40_000
    assert all(json.loads(line) for path in FOLDER.glob("*.jsonl") for line in path.read_text().splitlines())
