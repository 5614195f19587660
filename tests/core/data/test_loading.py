"""Rows of every kind through one door: what is held out, a user's own transform with options, what is refused."""

import json

import numpy as np
import pytest

from treetune.core.data import kinds, loading, row_formats, strides
from treetune.core.data.dataset import RowSettings

ASK, ANSWER = "Name a colour.", "Red, as in roses and in most of the evening skies."
CHAT = [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]
# For each kind, columns that it reads, and of what its documents or prompts speak.
ROWS = {
    "text": {"messages": CHAT},
    "pairs": {"messages": CHAT[:1], "chosen": CHAT[1], "rejected": {"role": "assistant", "content": "Blue."}},
    "unpaired": {"prompt": ASK, "completion": ANSWER, "label": True},
    "judged": {"prompt": ASK, "completion": ANSWER, "label": True},
    "ranked": {"input": ASK, "chosen": ANSWER, "rejected": "Blue."},
    "steps": {"prompt": ASK, "completions": [ANSWER, "So red."], "labels": [True, False]},
    "strided": {"messages": CHAT},
    "prompts": {"prompt": CHAT[:1], "answer": ANSWER},
    "truths": {"prompt": CHAT[:1], "ground_truth": ANSWER},
}
TRANSFORM = """
import json
def rows(cfg, *, kind, mark="", **options):
    row = json.load(open("rows_of_kinds.json"))[kind]
    def transform(example, tokenizer=None):
        made = json.loads(json.dumps(row).replace("colour", example["word"] + mark))
        if "label" in made:
            made["label"] = example["good"]
        return made
    return transform, {"remove_columns": "__all__"}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a transform and rows that no format reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(TRANSFORM)
    (tmp_path / "rows_of_kinds.json").write_text(json.dumps(ROWS))
    odd = [{"word": f"w{i}", "good": i % 2 == 0} for i in range(8)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    return tmp_path


def spec(kind):
    return kinds.strided(strides.Places(2, 2, 2)) if kind == "strided" else kind


def settings(kind, name, **more):
    encoding = {"chat_template": "chatml"} if kind in ("text", "pairs", "ranked", "strided", "prompts", "truths") else {}
    return RowSettings(("odd.jsonl",), ({"path": "odd.jsonl", "type": name},), encoding=encoding, **more)


def text(one, tokenizer) -> str:
    return tokenizer.decode(one.tokens)


def test_every_kind_of_formats_has_a_row():
    assert set(ROWS) == {kind for one in row_formats.FORMATS for kind in one.kinds} - {"answers"}


@pytest.mark.parametrize("kind", ROWS)
def test_a_transform_with_options_serves_every_kind(here, kind, tokenizer):
    for name, mark in (("mine.py:rows", ""), ("mine.rows", "!")):
        path = f"{name}?kind={kind},mark={mark}" if mark else f"{name}?kind={kind}"
        data = loading.load(spec(kind), settings(kind, path, val_set_size=2.0), tokenizer, seed=0)
        assert len(data.train) == 6 and len(data.val) == 2 and len(data.lines) >= 2
        texts = [text(one, tokenizer) for one in data.train + data.val]
        assert len(set(texts)) == 8 and all(any(f"w{i}{mark}" in one for one in texts) for i in range(8))
        if kind in ("prompts", "truths"):
            assert all(one.columns["answer" if kind == "prompts" else "ground_truth"] == ANSWER for one in data.train)


def test_other_keys_of_an_entry_are_options_of_the_format_that_results(here, tokenizer):
    plain, named = (settings("text", "mine.py:rows?kind=text") for _ in range(2))
    entry = named.datasets[0] | {"roles_to_train": ["user"]}
    data = [loading.load("text", one, tokenizer, seed=0) for one in (plain, RowSettings(("odd.jsonl",), (entry,), encoding=plain.encoding))]
    trained = [tokenizer.decode(one.train[0].tokens[np.flatnonzero(one.train[0].weight)]) for one in data]
    assert "Red" in trained[0] and "Name a w0." in trained[1] and "Red" not in trained[1]
    wrong = RowSettings(("odd.jsonl",), (entry | {"type": "mine.py:rows?kind=unpaired"},))
    with pytest.raises(ValueError, match="takes no roles_to_train"):
        loading.load("unpaired", wrong, tokenizer, seed=0)


@pytest.mark.parametrize("kind", ["text", "prompts", "truths"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:absent", "mine.py has no function absent"),
        ("mine.py:rows?kind", "the option 'kind' of mine.py:rows is not name=value"),
        ("mine.py:rows?kind=text,kind=text", "each name once"),
        ("mine.py:rows", "raised TypeError"),
        ("other.py:rows", "no file other.py"),
    ],
)
def test_a_transform_that_cannot_be_is_refused_by_name(here, kind, name, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        loading.load(kind, settings(kind, name), tokenizer, seed=0)


def test_options_that_the_rows_would_ignore_are_handed_back(here, tokenizer):
    reasons = []
    loading.load("unpaired", settings("unpaired", "mine.py:rows?kind=unpaired"), tokenizer, seed=0, refuse=reasons.append)
    assert reasons[0]["train_on_inputs"] == "rows of format passthrough do not take it" and reasons[0]["data"] == "datasets is given"


def test_a_format_of_ones_own_is_one_line_of_the_table(here, tokenizer, monkeypatch):
    from treetune.core.data import formats, instruction, sources

    def reader(tokenizer, *, train_on_inputs=False):
        def read(row):
            return instruction.prompt_and_output(f"{row['word']}: ", str(row["good"]), "", train_on_inputs)

        return lambda rows: [read(row) for row in rows.rows]

    line = row_formats.text("words", (("word", "good"),), reader, fix="fill the good column", rank=9)
    monkeypatch.setattr(row_formats, "FORMATS", [*row_formats.FORMATS, line])
    data = loading.load("text", RowSettings(("odd.jsonl",)), tokenizer, seed=0)
    assert data.format == "words" and len(data.train) == 8 and "words: 8 rows" in data.lines[0]
    assert kinds.KINDS["text"].canonical("words") == "words" and formats.takes("words") == ("train_on_inputs",)
    with pytest.raises(ValueError, match="words needs word [+] good"):
        formats.detect(sources.columns(sources.from_list([{"nothing": 1}])))
