"""Rows of every format with something in them replaced, taken out or put in: documents, or one line that names file and row."""

import datetime
import json
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.data import (
    ebft,
    formats,
    instruction,
    kinds,
    pack,
    pretokenised,
    prompts,
    reward,
    row_formats,
    segments,
    sources,
    spans,
    trees,
)

FOLDER = Path(__file__).parents[3] / "examples" / "data" / "formats"
USER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}
PAIRS, KTO = row_formats.of_kind("pairs"), row_formats.of_kind("unpaired")
REPLIES = {name: form for name, form in row_formats.of_kind("truths").items() if "." in name}
RANKED = {name: form for name, form in row_formats.of_kind("ranked").items() if name not in PAIRS}
STEPS = row_formats.of_kind("steps")["stepwise_supervised"].reader()


JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-9, 400)
    | st.sampled_from([10**400, -(2**63) - 1, 2**64, 1e308, float("inf"), "9" * 400, Decimal("1.5"), b"x", datetime.date(1, 1, 1)])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["a\n", "\ud800", " ", "assistant"])
)
VALUES = st.recursive(
    JUNK,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "label", "rank", "tool_calls", "train"]), inner)
    ),
    max_leaves=6,
)


def encoded(read, rows, tokenizer):
    """As formats.encode_rows does it."""
    texts = read(rows)
    for i, text in enumerate(texts):
        trees.check_unicode(text.text, sources.locate_row(rows, i))
    return spans.encode(texts, tokenizer, spans.read_special_tokens(tokenizer))


def families(tokenizer):
    made = {f"dpo.{name}": lambda rows, form=form: trees.encode_rows(rows, form.reader(), tokenizer)[0] for name, form in PAIRS.items()}
    made |= {f"kto.{name}": lambda rows, form=form: trees.encode_rows(rows, form.reader(), tokenizer)[0] for name, form in KTO.items()}
    made |= {name: lambda rows, form=form: trees.encode_rows(rows, form.reader(), tokenizer)[0] for name, form in RANKED.items()}
    made |= {
        name: lambda rows, name=name: encoded(instruction.shape_reader(name)(tokenizer), rows, tokenizer) for name in instruction.SHAPES
    }
    made |= {name: lambda rows, form=form: ebft.read_structured(rows, form.reader)[0] for name, form in REPLIES.items()}
    made |= {name: lambda rows, form=form: form.reader(rows, tokenizer) for name, form in row_formats.of_kind("strided").items()}
    made |= {
        f"text.{name}": lambda rows, name=name: formats.encode_rows(rows, tokenizer, format=name)[0]
        for name in ("chat", "alpaca", "completion", "input_output", "pretokenised", "user_defined")
    }
    made |= {
        f"{kind}.all": lambda rows, kind=kind: whole(kind, rows, tokenizer) for kind in ("pairs", "judged", "ranked", "steps", "strided")
    }
    return made | {
        "stepwise_supervised": lambda rows: reward.encode_steps(rows, STEPS, tokenizer)[0],
        "input_output": lambda rows: encoded(segments.reader(tokenizer), rows, tokenizer),
        "pretokenised": pretokenised.reader(tokenizer),
        "grpo": lambda rows: prompts.read_prompts(rows, tokenizer)[0],
    }


def whole(kind, rows, tokenizer):
    """As a command does it: the format by the columns, nothing unread that matters."""
    known = kinds.KINDS[kind]
    try:
        form = known.detect(sources.columns(rows), rows.rows[0])
    except ValueError as error:
        raise ValueError(f"data.jsonl: all {error}") from error
    return known.encode(rows, tokenizer, format=form)[0]


OWN = {
    "text.chat": {"messages": [USER | {"name": "x"}, REPLY | {"train": True, "weight": 0.5}], "tools": [], "system": "s"},
    "text.alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "s"},
    "text.completion": {"text": "a b c", "system": "s"},
    "text.input_output": {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]},
    "text.pretokenised": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
    "text.user_defined": {"instruction": "a", "output": "c", "system": "s"},
    "pairs.all": {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY | {"content": "c"}], "margin": 1, "system": "s", "tools": []},
    "judged.all": {"prompt": [USER], "completion": [REPLY], "label": True, "system": "s"},
    "ranked.all": {"input": "a", "chosen": "b", "rejected": "c", "margin": 0.5, "system": "s"},
    "steps.all": {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    "strided.all": {"messages": [USER, REPLY], "system": "s"},
}


def sample(name):
    if name in OWN:
        return OWN[name]
    path = FOLDER / f"{name.replace(':', '-')}.jsonl"
    return json.loads((path if path.exists() else FOLDER / f"orpo.{name.removeprefix('dpo.')}.jsonl").read_text().splitlines()[0])


def spoil(value, draw):
    """The value with something in it replaced, taken out or put in, at a random depth."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    at = draw(st.sampled_from(inner))
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return {key: one for key, one in value.items() if key != at} if isinstance(value, dict) else value[:at] + value[at + 1 :]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at] = spoil(value[at], draw) if kind < 3 else draw(VALUES)
    return copy


NAMED = re.compile(r"^data\.jsonl( row [12]|: not one|: all)|^(\d+|0) rows are desirable|^not one of \d+ documents has room")


@pytest.mark.parametrize("examples", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_rows_give_documents_or_a_named_error(tokenizer, examples):
    known = families(tokenizer)

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        name = data.draw(st.sampled_from(sorted(known)))
        whole = sample(name)
        rows = [spoil(whole, data.draw), whole]
        rows = [row if isinstance(row, dict) else whole for row in (rows if data.draw(st.booleans()) else rows[::-1])]
        try:
            found = known[name](sources.from_list(rows, "data.jsonl"))
        except ValueError as error:
            assert NAMED.match(str(error)), str(error)
            return
        check_result(found, name)

    check()


def check_result(found, name):
    assert len(found) >= 1
    if isinstance(found[0], trees.TreeDoc):
        batch = pack.collate_trees(found, read="classes" if found[0].classes is not None else "tokens")
        assert (batch["seq_lens"] > 0).all()
        return
    for one in found:
        if isinstance(one, spans.EncodedText | spans.Doc | ebft.StridedDoc):
            assert len(one.tokens) == len(one.weight) and not one.weight[:1].any() and np.isfinite(one.weight).all()
        else:
            assert one.tokens.size if name == "grpo" else one.ground_truth.strip() and one.prompt
