"""What is proposed for rows that no format fits reads them."""

import pytest
import yaml

from treetune.core.data import formats, kinds, sources, suggest

TALK = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
ROWS = {
    "question and answer": ("text", {"question": "a", "answer": "b", "id": 3}),
    "instruction and response": ("text", {"instruction": "a", "response": "b", "input": "c"}),
    "input and output": ("text", {"input": "a", "output": "b"}),
    "odd names": ("text", {"the question: all": "a", "model_answer": "b"}),
    "talk": ("text", {"dialog": TALK}),
    "texts": ("text", {"content": "a"}),
    "pairs": ("pairs", {"question": "a", "good": "b", "bad": "c"}),
    "judged": ("judged", {"question": "a", "answer": "b", "good": True}),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_entry_reads_the_rows(name, tokenizer):
    kind, row = ROWS[name]
    with pytest.raises(ValueError, match="the columns"):
        kinds.KINDS[kind].detect(list(row), row)
    entry = yaml.safe_load(suggest.suggest_entry("a b.jsonl", kind, list(row), row))["datasets"][0]
    assert entry.pop("path") == "a b.jsonl"
    form = entry.pop("type")
    own, form = (form, "user_defined") if isinstance(form, dict) else (entry, formats.ALIASES.get(form, form))
    rows = sources.from_list([row, row | ({"good": False} if kind == "judged" else {})])
    docs, _ = kinds.KINDS[kind].encode(rows, tokenizer, format=kinds.KINDS[kind].canonical(form), format_options=own)
    assert len(docs) == 2


def test_nothing_is_proposed_where_nothing_fits():
    assert (
        suggest.suggest_entry("a", "text", ["x", "y"], {"x": 1, "y": 2}) == ""
        and suggest.suggest_entry("a", "steps", ["question"], {}) == ""
    )
