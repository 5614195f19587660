"""Fixed wordings of turns, and texts with places in braces."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from treetune.core.data import sources, turns
from treetune.core.data.rows import Message

PLACE = re.compile(r"\{(\w+)\}")


class TurnStyle(NamedTuple):
    """Text around a turn: opening + role + middle + content + end + gap."""

    opening: str
    middle: str
    end: str
    gap: str


STYLES = {
    "chatml": TurnStyle("<|im_start|>", "\n", "<|im_end|>", "\n"),
    "llama3": TurnStyle("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", ""),
}


def render_prompt(style: TurnStyle, messages: Sequence[Message], location: str = "row") -> str:
    """The messages and the header of the assistant's turn. Errors: ValueError for a message without a text."""
    for message in messages:
        turns.turn_text(message, f"{location}: a message of the prompt")
    turn = "{}{}{}{}{}{}".format
    texts = (
        turn(style.opening, turn_message["role"], style.middle, turn_message["content"], style.end, style.gap) for turn_message in messages
    )
    return "".join(texts) + style.opening + "assistant" + style.middle


def compile_wording(option: str, form: str, needed: Sequence[str], optional: Sequence[str] = ()) -> Callable[..., str]:
    """Function that puts texts into the placeholders {name} of `form`; braces in the texts are left alone.

    Errors: ValueError, naming the option, for a form without a needed place or with an unknown one.
    """
    if not isinstance(form, str):
        raise ValueError(f"{option} is of type {type(form).__name__}, expected text with {{{needed[0]}}} in it")
    used_places = set(PLACE.findall(form))
    unknown, missing = used_places - {*needed, *optional}, set(needed) - used_places
    if unknown or missing:
        place_names = sources.join_names(f"{{{name}}}" for name in (*needed, *optional))
        wrong = f"names {sources.join_names(sorted(unknown))}" if unknown else f"lacks {sources.join_names(sorted(missing))}"
        raise ValueError(f"{option} {form!r} {wrong}: its places are {place_names}")
    return lambda **texts: PLACE.sub(lambda match: texts[match[1]], form)
