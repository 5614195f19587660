"""The formats of rows of every kind: one table, from a name and columns to the function that reads such rows.

A new format is a reader in a file of its own and a line in FORMATS. What a reader is depends on the kind:
- text: `reader(tokenizer, **options)` gives a function from `Rows` to texts with trained spans (`spans.Text`).
- pairs, ranked, unpaired, judged, answers: `reader(**options)` gives a function from (row, how errors name it) to `trees.PromptReplies`.
- steps: the same to `reward.Steps`.
- strided: `reader(rows, tokenizer, **options)` gives documents with a `prompt_length` (`ebft.StridedDoc`).
- truths: `reader(row, how errors name it)` gives rows with prompt, ground_truth and perhaps remaining_turns.
- prompts: `reader(row, column, how errors name it)` gives the row with its prompt in the column `prompt`.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

from treetune.core.data import (
    chat,
    completion,
    ebft,
    instruction,
    preference,
    pretokenised,
    prompt_completion,
    prompts,
    pygmalion,
    reward,
    segments,
    unpaired,
    wording,
)

CHAT = ("chat_template", "chat_template_jinja", "chat_template_kwargs")  # options of formats whose rows are messages
PREFERENCES = ("pairs", "ranked")
JUDGEMENTS = ("unpaired", "judged")


class RowFormat(NamedTuple):
    """How rows of one format are known and read.

    columns: any one of these sets, all names present. options: what its rows take. rank: where among its kind detection by columns
    tries it; None: it must be named, or be the only one with its columns. overlong: what happens to documents longer than sequence_len,
    unless said otherwise. fix: what to do when nothing of a data set is trained.
    """

    name: str
    kinds: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    reader: Callable
    options: tuple[str, ...] = ()
    rank: int | None = None
    overlong: str = "drop"
    fix: str = "fill the columns"


def of_kind(kind: str) -> dict[str, RowFormat]:
    """The formats of a kind by name, in the order of the table."""
    return {row_format.name: row_format for row_format in FORMATS if kind in row_format.kinds}


def detect_order(kind: str) -> list[RowFormat]:
    """The formats of a kind that detection tries, in its order."""
    return sorted(
        (row_format for row_format in FORMATS if kind in row_format.kinds and row_format.rank is not None),
        key=lambda row_format: row_format.rank or 0,
    )


def detect(kind: str, columns: Sequence[str]) -> RowFormat | None:
    """The first format whose columns are all there."""
    return next(
        (row_format for row_format in detect_order(kind) if any(set(needed) <= set(columns) for needed in row_format.columns)), None
    )


def keywords(reader: Callable) -> tuple[str, ...]:
    """The options of a reader: its keyword-only parameters, and the keys of the TypedDict that the rest of them is typed with."""
    names: list[str] = []
    for parameter in inspect.signature(reader).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            names += [name for options in get_args(parameter.annotation) for name in options.__annotations__]
    return tuple(names)


def text(
    name: str, columns: tuple[tuple[str, ...], ...], reader: Callable, *, fix: str, rank: int | None = None, overlong: str = "drop"
) -> RowFormat:
    """A format of texts with trained spans."""
    return RowFormat(name, ("text",), columns, reader, keywords(reader), rank, overlong, fix)


def sides(
    name: str,
    kinds: tuple[str, ...],
    columns: tuple[str, ...],
    reader: Callable,
    *,
    rank: int | None = None,
    messages: bool = False,
) -> RowFormat:
    """A format of prompts with continuations; messages: the chat template writes them."""
    return RowFormat(name, kinds, (columns,), reader, (*keywords(reader), *(CHAT if messages else ())), rank)


def _instructions() -> list[RowFormat]:
    """Instructions share their columns, so all but alpaca must be named."""
    shapes = instruction.SHAPES.items()
    rank = {"alpaca": 1}
    return [
        text(name, (shape.columns,), instruction.shape_reader(name), fix=f"fill the {shape.columns[-1]} column", rank=rank.get(name))
        for name, shape in shapes
    ]


def _worded_pairs() -> list[RowFormat]:
    """Pairs in a fixed wording."""
    formats = []
    for style, (name, columns) in itertools.product(("chatml", "llama3"), preference.PAIR_COLUMNS.items()):
        needed = tuple(names[0] for names in columns[:3] if names)
        reader = preference.without_options(preference.worded_pairs(wording.STYLES[style], columns))
        formats.append(sides(f"{style}.{name}", PREFERENCES, needed, reader))
    return formats


def _worded_judgements() -> list[RowFormat]:
    """Judged completions in a fixed wording."""
    formats = []
    for name, style in wording.STYLES.items():
        for layout, column in unpaired.FIELDS.items():
            reader = preference.without_options(unpaired.worded_judgement(style, column))
            formats.append(sides(f"{name}.{layout}", JUDGEMENTS, (column, "completion", "label"), reader))
        reader = preference.without_options(unpaired.conversation_judgement(style))
        formats.append(sides(f"{name}.argilla_chat", JUDGEMENTS, ("completion", "label"), reader))
    return formats


def _truth(name: str, columns: tuple[str, ...], reader: Callable, rank: int | None = None) -> RowFormat:
    return RowFormat(name, ("truths",), (columns,), reader, (), rank)


def _strided(name: str, columns: tuple[tuple[str, ...], ...], reader: Callable, rank: int | None = None, *, messages: bool = False):
    return RowFormat(name, ("strided",), columns, reader, CHAT if messages else (), rank, "truncate")


RANKED_COLUMNS = ("input", "chosen", "rejected")
BRADLEY_TERRY = preference.worded_pairs(wording.STYLES["llama3"], preference.PAIR_COLUMNS["icr"])
ARGILLA = preference.without_options(preference.argilla)
FORMATS: list[RowFormat] = [
    text(
        "chat", (("messages",), ("conversations",)), chat.reader, rank=0,
        fix="check the roles of the messages, roles_to_train and the train flags",
    ),
    *_instructions(),
    text("pygmalion", (("conversations",),), pygmalion.reader, fix="add messages of the bot"),
    text("user_defined", ((),), instruction.user_defined, fix="fill the column that field_output names"),
    text("input_output", (("segments",),), segments.reader, rank=2, fix="label some segments true"),
    text("pretokenised", (("input_ids", "labels"),), pretokenised.reader, rank=3, fix="give some tokens a label other than -100"),
    text("prompt_completion", (prompt_completion.NAMES,), prompt_completion.reader, rank=5, fix="fill the completion column"),
    text("completion", (("text",),), completion.reader, rank=4, overlong="split", fix="fill the text column"),

    sides("bradley_terry.chat_template", ("ranked",), RANKED_COLUMNS, preference.without_options(reward.ranked), rank=0, messages=True),
    sides("bradley_terry.llama3", ("ranked",), RANKED_COLUMNS, preference.without_options(BRADLEY_TERRY)),
    *_worded_pairs(),
    sides("zephyr.nectar", PREFERENCES, ("prompt", "answers"), preference.without_options(preference.nectar)),
    sides("chat_template.default", PREFERENCES, ("messages", "chosen", "rejected"), preference.templated, rank=1, messages=True),
    sides("chat_template.argilla", PREFERENCES, ("chosen", "rejected"), ARGILLA, rank=3, messages=True),
    sides("chat_template.argilla_chat", PREFERENCES, ("chosen", "rejected"), ARGILLA, messages=True),
    sides("user_defined.default", PREFERENCES, ("prompt", "chosen", "rejected"), preference.user_defined),
    sides(
        "passthrough", PREFERENCES, ("prompt", "chosen", "rejected"), preference.without_options(preference.passthrough), rank=2,
        messages=True,
    ),

    *_worded_judgements(),
    sides("user_defined.default", JUDGEMENTS, ("prompt", "completion", "label"), unpaired.user_defined),
    sides(
        "passthrough", JUDGEMENTS, ("prompt", "completion", "label"), preference.without_options(unpaired.passthrough), rank=0,
        messages=True,
    ),

    sides("stepwise_supervised", ("steps",), ("prompt", "completions", "labels"), reward.stepwise, rank=0),
    sides("prompt_completion", ("answers",), ("prompt", "completion"), preference.without_options(unpaired.answer), rank=0, messages=True),
    sides("messages", ("answers",), ("messages",), preference.without_options(unpaired.conversation), rank=1, messages=True),

    _strided("ebft_pretrain.transform", (("text",),), ebft.pretrain, 1),
    _strided("ebft_strided_structured.transform", tuple(itertools.product(*ebft.ANSWERED)), ebft.strided_structured, 3),
    _strided("ebft_strided_chat.transform", (("messages",), ("conversations",)), ebft.strided_chat, 2, messages=True),
    _strided("ebft_reasoning.transform_strided", (("messages",), ("conversations",)), ebft.reasoning_strided, messages=True),
    _strided("pretokenised", (("input_ids",),), ebft.read_strided, 0),

    _truth("ebft_opencode.transform", ("input", "output"), ebft.opencode, 1),
    _truth("ebft_chat_multiturn.transform", ("messages",), ebft.first_turn, 2),
    _truth("ebft_chat_multiturn.transform_last_turn", ("messages",), ebft.last_turn),
    _truth("ebft_chat_multiturn.transform_all_turns", ("messages",), ebft.all_turns),
    _truth("ebft_reasoning.transform", ("messages",), ebft.last_turn),
    _truth("ebft_reasoning.transform_answer_only", ("messages",), ebft.answer_only),
    _truth("ebft_reasoning.transform_split_thinking", ("messages",), ebft.split_thinking),
    _truth("prompt, ground_truth", ("prompt", "ground_truth"), ebft.as_target, 0),
    _truth("conversations", ("conversations",), ebft.first_turn, 3),
    _truth("question, answer", ("question", "answer"), ebft.question_answer, 4),
    _truth("prompt, completion", ("prompt", "completion"), ebft.prompt_completion, 5),

    RowFormat("prompt", ("prompts",), (("prompt",),), prompts.from_column, rank=0),
    RowFormat("messages", ("prompts",), (("messages",),), prompts.from_column, rank=1),
    RowFormat("question", ("prompts",), (("question",),), prompts.from_question, rank=2),
]  # fmt: skip
