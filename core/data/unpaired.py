"""Unpaired preference rows: a prompt, a completion, and whether it is a good one. One table of formats."""

from collections.abc import Callable, Sequence

from treetune.core.data import preference, sources, trees, turns, wording
from treetune.core.data.rows import Row

FIELDS = {"argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt"}
LABELS = {"true": True, "false": False, "1": True, "0": False}


def read_label(row: Row, name: str, location: str) -> dict[str, tuple]:
    """The row's judgement as `desirable`. Errors: ValueError for anything but true and false (or 1 and 0, or these as text)."""
    value = row.get(name)
    if value is None:
        raise sources.missing_field([name], row, location)
    number = preference.parse_number(value) if not isinstance(value, str) else None  # 1.0 is what a column of 1 and null becomes
    text = str(value) if isinstance(value, bool | str) else f"{number:g}" if number is not None else ""
    desirable = LABELS.get(text.strip().lower())
    if desirable is None:
        raise ValueError(f"{location}: field {name} is {sources.quote(value)}, expected true or false")
    return {"desirable": (desirable,)}


def worded_judgement(style: wording.TurnStyle, field: str) -> Callable[[Row, str], trees.PromptReplies]:
    """Reader of rows in a fixed wording."""

    def read(row: Row, location: str) -> trees.PromptReplies:
        history = preference.system_messages(row, location) + [{"role": "user", "content": preference.column_text(row, (field,), location)}]
        reply = preference.column_text(row, ("completion",), location)
        return trees.PromptReplies(wording.render_prompt(style, history, location), (reply,), read_label(row, "label", location), style.end)

    return read


def conversation_judgement(style: wording.TurnStyle) -> Callable[[Row, str], trees.PromptReplies]:
    """argilla_chat: the completion is a conversation, or the reply alone with the question in `chosen`."""

    def read(row: Row, location: str) -> trees.PromptReplies:
        field_location, messages = f"{location}: field completion", row.get("completion")
        if isinstance(messages, list) and len(messages) == 1 and row.get("chosen") is not None:
            messages = [
                message
                for message in turns.read_turns(row["chosen"], f"{location}: field chosen", replies=None)
                if message["role"] != "assistant"
            ] + messages
        history, reply = turns.read_dialogue(messages, field_location)
        prompt = wording.render_prompt(style, turns.with_system(history, row, location), location)
        return trees.PromptReplies(
            prompt, (turns.turn_text(reply, f"{field_location}: the reply"),), read_label(row, "label", location), style.end
        )

    return read


def user_defined(
    *,
    field_prompt: str = "prompt",
    field_system: str = "system",
    field_completion: str = "completion",
    field_label: str = "label",
    prompt_format: str = "{prompt}",
    completion_format: str = "{completion}",
) -> Callable[[Row, str], trees.PromptReplies]:
    """user_defined.default: columns of any name, put into texts of any wording. A missing system leaves its place empty."""
    ask = wording.compile_wording("prompt_format", prompt_format or "{prompt}", ("prompt",), ("system",))
    answer = wording.compile_wording("completion_format", completion_format or "{completion}", ("completion",))

    def read(row: Row, location: str) -> trees.PromptReplies:
        before = "".join(message["content"] for message in preference.system_messages(row, location, field_system))
        question, reply = (preference.column_text(row, (name,), location) for name in (field_prompt, field_completion))
        filled = answer(completion=reply) if reply.strip() else ""
        return trees.PromptReplies(ask(prompt=question, system=before), (filled,), read_label(row, field_label, location))

    return read


def passthrough(row: Row, location: str) -> trees.PromptReplies:
    """Prompt and completion as they are: two texts, or a conversation and the reply for the chat template."""
    judged = read_label(row, "label", location)
    return answer(row, location)._replace(extras=judged)


def answer(row: Row, location: str) -> trees.PromptReplies:
    """As `passthrough`, without a judgement."""
    if not isinstance(row.get("prompt"), list):
        return trees.PromptReplies(
            preference.column_text(row, ("prompt",), location), (preference.column_text(row, ("completion",), location),), {}
        )
    messages, field_location = turns.read_turns(row["prompt"], f"{location}: field prompt", replies=0), f"{location}: field completion"
    messages = turns.with_system(messages, row, location)
    if isinstance(row.get("completion"), str):
        return trees.PromptReplies(
            messages, ({"role": "assistant", "content": preference.column_text(row, ("completion",), location)},), {}
        )
    reply = turns.read_turns(row.get("completion"), field_location, replies=1)
    if [message["role"] for message in reply] != ["assistant"]:
        raise ValueError(f"{field_location} has {len(reply)} messages, expected one of the assistant")
    return trees.PromptReplies(messages, (reply[0],), {})


def conversation(row: Row, location: str) -> trees.PromptReplies:
    """A whole conversation under `messages`, whose last message is the reply, without a judgement."""
    history, reply = turns.read_dialogue(row.get("messages"), f"{location}: field messages")
    return trees.PromptReplies(turns.with_system(history, row, location), (reply,), {})


def add_foreign_replies(rows: sources.Rows, read: Callable[[Row, str], trees.PromptReplies]) -> Callable[[Row, str], trees.PromptReplies]:
    """Reader that adds a second continuation to each row: that of the nearest row before it (in a circle) with another prompt.

    `kind` is 0 for the row's own completion and 1 for the foreign one, of which KTO's baseline is made; encode with distinct=False.
    Errors: ValueError when all rows have one prompt.
    """
    row_sides = [read(row, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)]
    usable = [i for i, sides in enumerate(row_sides) if trees.drop_reason(sides, False) == ""]
    if usable and all(row_sides[i].prompt == row_sides[usable[0]].prompt for i in usable):
        raise ValueError(
            f"{rows.name}: all {len(usable)} rows have one prompt, so no completion is foreign to it: add rows with other prompts"
        )
    foreign = {id(rows.rows[i]): row_sides[_before(row_sides, usable, position)].replies[0] for position, i in enumerate(usable)}

    def both(row: Row, location: str) -> trees.PromptReplies:
        sides = read(row, location)
        if id(row) not in foreign:
            return sides
        extras = {name: values * 2 for name, values in sides.extras.items()} | {"kind": (0, 1)}
        return sides._replace(replies=(*sides.replies, foreign[id(row)]), extras=extras)

    return both


def _before(row_sides: Sequence[trees.PromptReplies], usable: Sequence[int], position: int) -> int:
    circle = (usable[position - step] for step in range(1, len(usable)))
    return next(i for i in circle if row_sides[i].prompt != row_sides[usable[position]].prompt)
