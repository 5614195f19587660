"""Instruction rows: one table, from the name of a format to the columns it needs, its prompt and its response.

Sources of the wordings: Taori et al., Stanford Alpaca: An Instruction-following LLaMA model (2023), and the formats named in the table.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict, Unpack

from treetune.core.data import sources, spans, turns, wording
from treetune.core.data.rows import Row
from treetune.core.protocols import Tokenizer

BLANKS = (" ", "\t")
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
REFLECT = " First give an abstract with a method, then reflect on its mistakes as an expert would, then give the final response."
CONCISE = "Below is an instruction from a USER and an ASSISTANT's response. The ASSISTANT's response is accurate and concise."
CONTEXT = "Use the following contextual information to concisely answer the question."
UNKNOWN = (
    "The context provided does not contain any information about your inquiry. "
    "Therefore, I'm unable to answer your question based on the given context."
)
CREATIVE = (
    "Answer the following question in a comprehensive, in-depth, and creative way. The response should be relevant, accurate and clear."
)
CRITERIA = "refusal, prescriptive bias, creativity and comprehensiveness"
CRITIQUE = f"Score the answer to the question from 0 to 10 for {CRITERIA}; then explain each score and say what to improve. Write YAML."
REVISE = f"Revise the answer to the question after its evaluation for {CRITERIA}. Reply with the revised answer only."


class InstructionShape(NamedTuple):
    """One format: needed columns, optional ones, the text before the response, and the response."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    prompt: Callable[[Row], str]
    response: Callable[[Row], str]
    others: tuple[str, ...] = ()  # needed columns that hold something else than text
    ends: int = 1  # EOS tokens behind the response


def reader(tokenizer: Tokenizer, *, train_on_inputs: bool = False) -> Callable[[sources.Rows], list[spans.Text]]:
    """Reader of alpaca rows: the prompt, then the output, then a trained EOS. A row's `system` replaces the opening lines.

    train_on_inputs: every token is trained, else those of the output and the EOS.
    Errors: ValueError for a tokenizer without EOS and for rows without a needed field (named with the fields they have).
    """
    return shape_reader("alpaca")(tokenizer, train_on_inputs=train_on_inputs)


def shape_reader(name: str) -> Callable:
    """The reader of a format of SHAPES, with the options and errors of `reader`."""
    shape = SHAPES[name]

    def made(tokenizer: Tokenizer, *, train_on_inputs: bool = False) -> Callable[[sources.Rows], list[spans.Text]]:
        spans.require_eos(tokenizer)
        ending = str(tokenizer.eos_token) * shape.ends if shape.ends > 1 else ""

        def text(row: Row, location: str) -> spans.Text:
            needed = [column for column in shape.columns if column not in shape.others]
            spans.require_text(row, needed, shape.optional, location)
            missing = next((column for column in shape.others if row.get(column) is None), None)
            if missing:
                raise sources.missing_field([missing], row, location)
            return prompt_and_output(*_built(shape, row, location), ending, train_on_inputs)

        return lambda rows: [text(row, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)]

    return made


def _built(shape: InstructionShape, row: Row, location: str) -> tuple[str, str]:
    try:
        return shape.prompt(row), shape.response(row)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


def prompt_and_output(before: str, output: str, ending: str, train_on_inputs: bool) -> spans.Text:
    """Prompt and output as one text, trained from the output on, or all of it. An empty output leaves nothing to train."""
    if not output.strip():
        return spans.Text(before, ())
    end = len(before + output + ending)
    turn = spans.Turn(len(before), end, end, end, 1.0, 0.0)
    spaces = 0 if train_on_inputs else trailing_space(before, output)
    return spans.Text(before + output + ending, () if train_on_inputs else (turn,), train_on_inputs, 1.0, 0, spaces)


def trailing_space(before: str, output: str) -> int:
    """1 for a prompt that ends in a space: tokenizers mostly join that space to the next word, which is then not trained. Else 0."""
    return int(before[-1:] in BLANKS and not output[:1].isspace())


class ColumnOptions(TypedDict, total=False):
    """The documented options that name the columns of `user_defined` rows; an empty one leaves its column out."""

    field_system: str
    field_instruction: str
    field_input: str
    field_output: str


def user_defined(
    tokenizer: Tokenizer,
    *,
    format: str = "User: {instruction} {input}\nAssistant:",
    no_input_format: str = "User: {instruction}\nAssistant:",
    system_prompt: str = "",
    system_format: str = "{system}",
    train_on_inputs: bool = False,
    **columns: Unpack[ColumnOptions],
) -> Callable[[sources.Rows], list[spans.Text]]:
    """Reader of rows with columns of any name, put into texts of any wording.

    format: with {instruction} and {input}, for rows with an input; no_input_format: for rows without (when empty, format is for both).
    Either may hold {system}; where it does not, system_format with the row's system, or system_prompt, goes before. A field_ option that is
    empty leaves its column out.
    Errors: ValueError for a tokenizer without EOS, for formats with unknown or missing places, and for rows without a needed field.
    """
    spans.require_eos(tokenizer)
    field_system, field_input = columns.get("field_system", "system"), columns.get("field_input", "input")
    field_instruction, field_output = columns.get("field_instruction", "instruction"), columns.get("field_output", "output")
    if not field_instruction or not field_output:
        raise ValueError(f"field_instruction is {field_instruction!r} and field_output is {field_output!r}: both need the name of a column")
    fill = {
        True: wording.compile_wording("format", format, ("instruction",), ("input", "system")),
        False: wording.compile_wording(
            "no_input_format", no_input_format or format, ("instruction",), ("system",) if no_input_format else ("input", "system")
        ),
    }
    forms = {True: format, False: no_input_format or format}
    opening = wording.compile_wording("system_format", system_format, ("system",))

    def text(row: Row, location: str) -> spans.Text:
        spans.require_text(row, (field_instruction, field_output), [name for name in (field_system, field_input) if name], location)
        system, input_text = row.get(field_system) or system_prompt, row.get(field_input) or ""
        before = opening(system=system) if system and "{system}" not in forms[bool(input_text)] else ""
        question = fill[bool(input_text)](instruction=row[field_instruction], input=input_text, system=system)
        return prompt_and_output(before + question, row[field_output], "", train_on_inputs)

    return lambda rows: [text(row, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)]


def alpaca_prompt(row: Row) -> str:
    """The text before the response in the Alpaca wording."""
    return _instruct(WITH_INPUT, WITHOUT_INPUT)(row)


def _instruct(with_input: str, without: str, instruction: str = "instruction", context_field: str = "input") -> Callable[[Row], str]:
    def build(row: Row) -> str:
        system = row.get("system") or (with_input if row.get(context_field) else without)
        if not isinstance(system, str):
            raise ValueError(f"field system is {turns.type_name(system)}, expected text")
        context = f"### Input:\n{row[context_field]}\n\n" if row.get(context_field) else ""
        return f"{system}\n\n### Instruction:\n{row[instruction]}\n\n{context}### Response:\n"

    return build


def _chat(with_input: str, without: str, instruction: str = "instruction", context_field: str = "input") -> Callable[[Row], str]:
    def build(row: Row) -> str:
        context = f"{row[context_field]}\n" if row.get(context_field) else ""
        return _said(with_input if context else without, f"{row[instruction]}\n{context}".removesuffix("\n"))

    return build


def _said(opening: str, question: str) -> str:
    return f"{opening}\n\nUSER: {question}\nASSISTANT:" if opening else f"USER: {question}\nASSISTANT:"


def _choices(opening: str) -> Callable[[Row], str]:
    def build(row: Row) -> str:
        if not isinstance(row["choices"], list) or not row["choices"] or not all(isinstance(choice, str) for choice in row["choices"]):
            raise ValueError(f"field choices is {turns.type_name(row['choices'])}, expected a list of texts")
        return _said(opening, "\n".join([row["question"], *(f'- "{choice}"' for choice in row["choices"])]))

    return build


def _solution(row: Row) -> str:
    if not row.get("solution") and not row.get("explanation"):
        raise ValueError(f"there is neither a solution nor an explanation; it has {sources.join_names(map(str, row))}")
    return row.get("solution") or row["explanation"]


def _open_orca(row: Row) -> str:
    system = f"### System:\n{row['system_prompt']}\n" if row["system_prompt"] else ""
    return f"{system}### Human:\n{row['question']}\n### Assistant:\n"


def _evaluation(row: Row) -> str:
    return _yaml({"scores": row["scores"]}) + _yaml({"critiques": row["critiques"]})


def _yaml(value: object, depth: int = 0) -> str:
    """Scores and critiques in YAML: as they are when they are text, else by keys."""
    if not isinstance(value, dict):
        return f" {value}\n"
    lines = (f"{'  ' * depth}{key}:{_yaml(inner, depth + 1)}" for key, inner in value.items())
    return ("\n" if depth else "") + "".join(lines)


def _reflection(row: Row) -> str:
    return f"### Thought:\n{row['output']}\n\n### Agent Reflection:\n{row['reflection']}\n\n### Final Response:\n{row['corrected']}"


def _reflection_chat(row: Row) -> str:
    return f" {row['output']}\nASSISTANT REFLECTION: {row['reflection']}\nASSISTANT: {row['corrected']}"


def _column(name: str, before: str = "") -> Callable[[Row], str]:
    return lambda row: before + row[name] if row[name].strip() else ""


def _about(context: str, question: str, opening: str = CONTEXT) -> Callable[[Row], str]:
    return lambda row: _said(opening, f"{row[context]}\n===\n{row[question]}")


def _rated(question: str, *, evaluated: bool = False) -> Callable[[Row], str]:
    def build(row: Row) -> str:
        evaluation = f"\nEvaluation:\n{_evaluation(row)}".removesuffix("\n") if evaluated else ""
        return _said("", f"{question}\n\nQuestion: {row['instruction']}\nAnswer: {row['answer']}{evaluation}")

    return build


ALPACA, RATED = ("instruction", "output"), ("scores", "critiques", "instruction", "answer")
REFLECTED = (*ALPACA, "reflection", "corrected")
CHOICES, CHOICE_LISTS = ("question", "choices"), ("choices",)
SHAPES: dict[str, InstructionShape] = {
    "alpaca": InstructionShape(ALPACA, ("input", "system"), _instruct(WITH_INPUT, WITHOUT_INPUT), _column("output")),
    "alpaca:chat": InstructionShape(ALPACA, ("input",), _chat(WITH_INPUT, WITHOUT_INPUT), _column("output")),
    "alpaca_chat": InstructionShape(("instruction", "response"), ("input",), _chat(WITH_INPUT, WITHOUT_INPUT), _column("response")),
    "alpaca_chat.load_qa": InstructionShape(("question", "answer"), (), _chat("", WITHOUT_INPUT, "question", ""), _column("answer")),
    "alpaca_chat.load_concise": InstructionShape(("instruction", "response"), ("input",), _chat(CONCISE, CONCISE), _column("response")),
    "alpaca_chat.load_camel_ai": InstructionShape(
        ("message_1", "message_2"), (), _chat("", WITHOUT_INPUT, "message_1", ""), _column("message_2")
    ),
    "alpaca_w_system.load_open_orca": InstructionShape(("system_prompt", "question", "response"), (), _open_orca, _column("response")),
    "gpteacher": InstructionShape(("instruction", "response"), ("input",), _instruct(WITH_INPUT, WITHOUT_INPUT), _column("response")),
    "gpteacher:chat": InstructionShape(("instruction", "response"), ("input",), _chat(WITH_INPUT, WITHOUT_INPUT), _column("response")),
    "oasst": InstructionShape(("INSTRUCTION", "RESPONSE"), (), _instruct("", WITHOUT_INPUT, "INSTRUCTION", ""), _column("RESPONSE")),
    "reflection": InstructionShape(REFLECTED, ("input",), _instruct(WITH_INPUT + REFLECT, WITHOUT_INPUT + REFLECT), _reflection),
    "reflection_ac": InstructionShape(REFLECTED, ("input",), _chat(WITH_INPUT + REFLECT, WITHOUT_INPUT + REFLECT), _reflection_chat),
    "jeopardy": InstructionShape(
        ("question", "category", "answer"),
        (),
        _instruct(
            "Below is a Jeopardy clue paired with its category. Write a concise response that best answers the clue.",
            "",
            "question",
            "category",
        ),
        _column("answer", "what is "),
    ),
    "explainchoice": InstructionShape(
        CHOICES,
        ("solution", "explanation"),
        _choices("Choose the answer that best answers the question. Explain your reasoning."),
        _solution,
        CHOICE_LISTS,
    ),
    "concisechoice": InstructionShape(
        CHOICES,
        ("solution", "explanation"),
        _choices("Choose the answer that best answers the question. Be concise in your response."),
        _solution,
        CHOICE_LISTS,
    ),
    "summarizetldr": InstructionShape(
        ("article", "summary"),
        (),
        lambda row: _said("", f"Summarize the following article as a TL;DR.\n{row['article']}"),
        _column("summary"),
    ),
    "context_qa": InstructionShape(("article", "question", "answer"), (), _about("article", "question"), _column("answer")),
    "context_qa.load_v2": InstructionShape(
        ("context", "question", "answer"),
        (),
        lambda row: f"Context: {row['context']}\nQuestion: {row['question']}\n",
        _column("answer", "Answer: "),
    ),
    "context_qa.load_404": InstructionShape(
        ("article", "unanswerable_question"), (), _about("article", "unanswerable_question"), lambda row: UNKNOWN
    ),
    "creative_acr.load_answer": InstructionShape(
        ("instruction", "revision"), (), lambda row: _said(CREATIVE, row["instruction"]), _column("revision")
    ),
    "creative_acr.load_critique": InstructionShape(RATED, (), _rated(CRITIQUE), _evaluation, ("scores", "critiques")),
    "creative_acr.load_revise": InstructionShape(
        (*RATED, "revision"), (), _rated(REVISE, evaluated=True), _column("revision"), ("scores", "critiques")
    ),
    "metharme": InstructionShape(("prompt", "generation"), (), lambda row: row["prompt"], _column("generation"), ends=3),
}


def columns(name: str) -> Sequence[str]:
    """Columns that a format needs."""
    return SHAPES[name].columns
