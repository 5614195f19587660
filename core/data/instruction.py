"""Instruction rows: instruction, optional input, output, optional system, in the Alpaca wording.

Source of the wording: Taori et al., Stanford Alpaca: An Instruction-following LLaMA model (2023).
"""

from collections.abc import Callable

from treetune.core.data import sources, spans

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def reader(tokenizer, *, train_on_inputs: bool = False) -> Callable[[sources.Rows], list[spans.Text]]:
    """A function from rows to texts: the prompt, then the output, then a trained EOS. A row's `system` replaces the opening lines.

    train_on_inputs: every token is trained, else those of the output and the EOS.
    Errors: ValueError for a tokenizer without EOS and for rows without a needed field (named with the fields they have).
    """
    spans.require_eos(tokenizer)

    def text(row: dict, where: str) -> spans.Text:
        spans.require_text(row, ("instruction", "output"), ("input", "system"), where)
        before, output = prompt(row), row["output"]
        if not output.strip():
            return spans.Text(before, ())
        turn = spans.Turn(len(before), len(before + output), len(before + output), len(before + output), 1.0, 0.0)
        return spans.Text(before + output, () if train_on_inputs else (turn,), whole=train_on_inputs, eos=1.0)

    return lambda rows: [text(row, sources.where(rows, i)) for i, row in enumerate(rows.rows)]


def prompt(row: dict) -> str:
    """The text before the response."""
    system = row.get("system") or (WITH_INPUT if row.get("input") else WITHOUT_INPUT)
    context = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
    return f"{system}\n\n### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"
