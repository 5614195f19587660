"""Unpaired preference rows: a prompt, a completion, and whether it is a good one. One table of formats."""

from collections.abc import Callable, Sequence

from treetune.core.data import preference, sources, trees, turns, wording

FIELDS = {"argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt"}
LABELS = {"true": True, "false": False, "1": True, "0": False}


def label(row: dict, name: str, where: str) -> dict[str, tuple]:
    """The row's judgement as `desirable`. Errors: ValueError for anything but true and false (or 1 and 0, or these as text)."""
    value = row.get(name)
    if value is None:
        raise sources.missing_field([name], row, where)
    number = preference.number(value) if not isinstance(value, str) else None  # 1.0 is what a column of 1 and null becomes
    text = str(value) if isinstance(value, bool | str) else f"{number:g}" if number is not None else ""
    known = LABELS.get(text.strip().lower())
    if known is None:
        raise ValueError(f"{where}: field {name} is {sources.quote(value)}, expected true or false")
    return {"desirable": (known,)}


def styled(style: wording.TurnStyle, field: str) -> Callable[[dict, str], trees.Sides]:
    """Reader of rows in a fixed wording."""

    def read(row: dict, where: str) -> trees.Sides:
        history = preference.system(row, where) + [{"role": "user", "content": preference.text(row, (field,), where)}]
        reply = preference.text(row, ("completion",), where)
        return trees.Sides(wording.render_prompt(style, history, where), (reply,), label(row, "label", where), style.end)

    return read


def talking(style: wording.TurnStyle) -> Callable[[dict, str], trees.Sides]:
    """argilla_chat: the completion is a conversation, or the reply alone with the question in `chosen`."""

    def read(row: dict, where: str) -> trees.Sides:
        here, said = f"{where}: field completion", row.get("completion")
        if isinstance(said, list) and len(said) == 1 and row.get("chosen") is not None:
            said = [
                one for one in turns.read_turns(row["chosen"], f"{where}: field chosen", replies=None) if one["role"] != "assistant"
            ] + said
        history, reply = turns.read_dialogue(said, here)
        prompt = wording.render_prompt(style, turns.with_system(history, row, where), where)
        return trees.Sides(prompt, (turns.turn_text(reply, f"{here}: the reply"),), label(row, "label", where), style.end)

    return read


def user_defined(
    *,
    field_prompt: str = "prompt",
    field_system: str = "system",
    field_completion: str = "completion",
    field_label: str = "label",
    prompt_format: str = "{prompt}",
    completion_format: str = "{completion}",
) -> Callable[[dict, str], trees.Sides]:
    """user_defined.default: columns of any name, put into texts of any wording. A missing system leaves its place empty."""
    ask = wording.compile_wording("prompt_format", prompt_format or "{prompt}", ("prompt",), ("system",))
    answer = wording.compile_wording("completion_format", completion_format or "{completion}", ("completion",))

    def read(row: dict, where: str) -> trees.Sides:
        before = "".join(one["content"] for one in preference.system(row, where, field_system))
        asked, reply = (preference.text(row, (name,), where) for name in (field_prompt, field_completion))
        filled = answer(completion=reply) if reply.strip() else ""
        return trees.Sides(ask(prompt=asked, system=before), (filled,), label(row, field_label, where))

    return read


def passthrough(row: dict, where: str) -> trees.Sides:
    """Prompt and completion as they are: two texts, or a conversation and the reply for the chat template."""
    judged = label(row, "label", where)
    return answer(row, where)._replace(extras=judged)


def answer(row: dict, where: str) -> trees.Sides:
    """The same without a judgement."""
    if not isinstance(row.get("prompt"), list):
        return trees.Sides(preference.text(row, ("prompt",), where), (preference.text(row, ("completion",), where),), {})
    said, here = turns.read_turns(row["prompt"], f"{where}: field prompt", replies=0), f"{where}: field completion"
    said = turns.with_system(said, row, where)
    if isinstance(row.get("completion"), str):
        return trees.Sides(said, ({"role": "assistant", "content": preference.text(row, ("completion",), where)},), {})
    reply = turns.read_turns(row.get("completion"), here, replies=1)
    if [one["role"] for one in reply] != ["assistant"]:
        raise ValueError(f"{here} has {len(reply)} messages, expected one of the assistant")
    return trees.Sides(said, (reply[0],), {})


def mismatched(rows: sources.Rows, read: Callable[[dict, str], trees.Sides]) -> Callable[[dict, str], trees.Sides]:
    """A reader that gives each row a second continuation: that of the nearest row before it (in a circle) with another prompt.

    `kind` is 0 for the row's own completion and 1 for the foreign one, of which KTO's baseline is made; encode with distinct=False.
    Errors: ValueError when all rows have one prompt.
    """
    own = [read(row, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)]
    usable = [i for i, sides in enumerate(own) if trees.unusable(sides, False) == ""]
    if usable and all(own[i].prompt == own[usable[0]].prompt for i in usable):
        raise ValueError(
            f"{rows.name}: all {len(usable)} rows have one prompt, so no completion is foreign to it: add rows with other prompts"
        )
    foreign = {id(rows.rows[i]): own[_before(own, usable, at)].replies[0] for at, i in enumerate(usable)}

    def both(row: dict, where: str) -> trees.Sides:
        sides = read(row, where)
        if id(row) not in foreign:
            return sides
        extras = {name: values * 2 for name, values in sides.extras.items()} | {"kind": (0, 1)}
        return sides._replace(replies=(*sides.replies, foreign[id(row)]), extras=extras)

    return both


def _before(own: Sequence[trees.Sides], usable: Sequence[int], at: int) -> int:
    circle = (usable[at - step] for step in range(1, len(usable)))
    return next(i for i in circle if own[i].prompt != own[usable[at]].prompt)


def _styles() -> dict[str, trees.Form]:
    forms = {}
    for name, style in wording.STYLES.items():
        forms |= {
            f"{name}.{kind}": trees.Form((field, "completion", "label"), preference.fixed(styled(style, field)))
            for kind, field in FIELDS.items()
        }
        forms[f"{name}.argilla_chat"] = trees.Form(("completion", "label"), preference.fixed(talking(style)))
    return forms


FORMATS: dict[str, trees.Form] = _styles() | {
    "user_defined.default": trees.Form(("prompt", "completion", "label"), user_defined),
    "passthrough": trees.Form(("prompt", "completion", "label"), preference.fixed(passthrough)),
}
