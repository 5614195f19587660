"""Marks of a chat template that the tokenizer does not know: a sign that the template is another model's."""

import re

from treetune.core.protocols import Tokenizer

# What templates write around turns: <|im_start|>, <start_of_turn>, [INST], <s>.
MARK = re.compile(r"<\|[\w/.:-]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]")


def foreign(tokenizer: Tokenizer, template: str) -> dict[str, int]:
    """{mark of a template: into how many tokens it falls}, for marks that are no token of the tokenizer."""
    counts = {mark: len(tokenizer.encode(mark, add_special_tokens=False)) for mark in dict.fromkeys(MARK.findall(template))}
    return {mark: count for mark, count in counts.items() if count > 1}


def warning(tokenizer: Tokenizer, name: str, template: str) -> str:
    """A line about a template that was given by name and is not of this tokenizer; empty where it is."""
    split_marks = foreign(tokenizer, template)
    if not split_marks:
        return ""
    mark, count = next(iter(split_marks.items()))
    more = f", and {len(split_marks) - 1} more" if len(split_marks) > 1 else ""
    fix = "leave chat_template out to take the model's own, or add the marks with tokens"
    seen = f"it writes {mark}, which its tokenizer splits into {count} tokens{more}"
    return f"chat template {name:.40} is not one of this model's: {seen}; {fix}"
