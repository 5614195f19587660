"""Documents as long as the options allow, in place of rows: what the largest micro-batch of a run holds."""

from typing import Any

import numpy as np

from treetune.cli.methods.method import Method
from treetune.core.config import table
from treetune.core.data import dataset, ebft, spans, trees

PROMPTS = "prompts", "truths"  # kinds of rows that completions are sampled for


def of_config(method: Method, config: Any) -> list[Any]:
    """The documents of one micro-batch; every token that may be trained is."""
    values = table.flatten(config)
    rows, length = values["micro_batch_size"], values.get("sequence_len") or 0
    if method.data in PROMPTS:
        return [_sampled(method, values, row) for row in range(rows)]
    whole = _whole(method, length)
    if not values.get("sample_packing", True):
        return [whole] * rows
    budget = dataset.batching(packing=True, sequence_len=length, micro_batch_size=rows, longest=len(whole.tokens))["budget"]
    count, rest = divmod(budget, len(whole.tokens))
    # What is left of the budget is filled by a shorter one, where there is room for a prompt and answers.
    return [whole] * count + ([_whole(method, _length(method, rest))] if rest >= 16 else [])


def _length(method: Method, tokens: int) -> int:
    """The length of the prompt with one answer, for a document of so many tokens."""
    return tokens if method.data in ("text", "strided", "steps") else 2 * tokens // 3


def _whole(method: Method, length: int) -> Any:
    """A text, or a prompt with answers that are as long as it is."""
    if method.data == "strided":
        return ebft.StridedDoc(_tokens(length), (np.arange(length) > 0).astype(np.float32), 0, 0)
    if method.data == "text":
        return spans.Doc(_tokens(length), (np.arange(length) > 0).astype(np.float32), 0)
    if method.data == "steps":
        return _steps(length)
    prompt = max(1, length // 2)
    return trees.grow(_tokens(prompt), [_branch(max(1, length - prompt))] * 2, row=0, extras=_extras(method))


def _extras(method: Method) -> dict[str, tuple]:
    return {"desirable": (True, True)} if method.data in ("unpaired", "judged") else {}


def _steps(length: int) -> trees.TreeDoc:
    """A solution whose steps of 32 tokens are judged."""
    tokens = np.arange(length)
    doc = trees.grow(_tokens(length), [], row=0)
    return doc._replace(classes=np.where((tokens % 32 == 31) | (tokens == length - 1), 1, -1).astype(np.int32))


def _sampled(method: Method, values: dict[str, Any], row: int) -> trees.TreeDoc:
    """A prompt with its completions, all of the longest length, and the true reply where it trains, too."""
    prompt = values.get("max_prompt_len") or values["sequence_len"]
    longest, count = values["max_completion_length"], values["num_generations"]
    branches, extras = [_branch(longest)] * count, {"advantage": (0.5,) * count}
    if method.data == "truths" and values["ce_coef"]:
        extras = {"advantage": (0.5,) * count + (0.0,), "kind": (0,) * count + (1,)}
        branches.append(_branch(longest))
    doc = trees.grow(_tokens(prompt), branches, row=row, extras=extras)
    names = ["sampler_logp"] + ["old_logp"] * (max(values.get("num_iterations", 1), values.get("steps_per_generation", 1)) > 1)
    return doc._replace(values={name: np.zeros(len(doc.tokens), np.float32) for name in names})


def _tokens(count: int) -> np.ndarray:
    return np.zeros(count, np.int32)


def _branch(count: int) -> tuple[np.ndarray, np.ndarray]:
    return _tokens(count), np.ones(count, np.float32)
