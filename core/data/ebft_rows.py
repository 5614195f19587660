"""Prompts of structured energy-based fine-tuning, with the ids of the true conversation beside them.

Columns of a prompt: ground_truth and remaining_turns as the transform gave them; truth, the ids of the true conversation after the prompt;
replies, True where these are a reply; between, for each later reply the ids that stand between it and the one before.
"""

import numpy as np

from treetune.core.data import spans
from treetune.core.data.prompts import Prompt


def first_reply(prompt: Prompt) -> int:
    """Tokens of the true reply itself, without what followed it."""
    replies = prompt.columns["replies"]
    return len(replies) if replies.all() else int(np.argmin(replies))


def document(prompt: Prompt) -> spans.Doc:
    """The prompt with the true conversation, its replies scored: what supervised fine-tuning would train on."""
    tokens = np.concatenate([prompt.tokens, prompt.columns["truth"]]).astype(np.int32)
    weight = np.concatenate([np.zeros(len(prompt.tokens)), prompt.columns["replies"]]).astype(np.float32)
    return spans.Doc(tokens, weight, prompt.row)
