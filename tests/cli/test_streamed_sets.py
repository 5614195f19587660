"""Several data sets of text at once, each with options of its own, in memory and streamed; and streams of chats."""

import json

import pytest
import yaml

from treetune.core.data import pack

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.fixture
def files(kit, here):
    """a.jsonl with the texts of `body`, b.jsonl with those of `text`, c.jsonl with those inside `said`, and all.jsonl with all."""
    texts = {name: [f"{name} {word} {word} sat." for word in WORDS] for name in "abc"}
    kit.write_rows(here / "a.jsonl", [{"body": text} for text in texts["a"]])
    kit.write_rows(here / "b.jsonl", [{"text": text} for text in texts["b"]])
    kit.write_rows(here / "c.jsonl", [{"said": {"by": "me", "what": {"text": text}}} for text in texts["c"]])
    return texts


SETS = [
    {"path": "a.jsonl", "text_column": "body", "skip": 2}, {"path": "b.jsonl", "type": "completion"},
    {"data_files": "c.jsonl", "ds_type": "json", "field": "said.what.text", "skip": 5},
]  # fmt: skip
ONE = ["--no-sample-packing", "--micro-batch-size", 1, "--gradient-accumulation-steps", 1]


@pytest.fixture
def texts(kit, tiny, tune, monkeypatch, here):
    """texts(command, sets, args) -> the texts that a run trained on, in order."""
    seen, plain, reader = [], pack.collate, kit.tokenizer()
    monkeypatch.setattr(pack, "collate", lambda docs, **options: seen.extend(docs) or plain(docs, **options))

    def run(command, sets, *args, name="run", **more):
        seen.clear()
        keys = {"model": str(tiny.model), "sequence_len": 200, "sample_prompt": "", "val_set_size": 0, "datasets": sets} | more
        (here / "run.yaml").write_text(yaml.safe_dump(keys))
        done = tune(command, "--config", "run.yaml", "--output-dir", name, *ONE, *args)
        assert done.code == 0, done.err
        return [reader.decode(doc.tokens.tolist(), skip_special_tokens=True) for doc in seen]

    return run


def test_each_set_of_text_has_its_own_options(texts, files):
    read = texts("pretrain", SETS, "--no-shuffle", "--max-steps", 17)
    assert read == files["a"][2:] + files["b"] + files["c"][5:]


def test_sets_of_a_stream_are_read_one_after_another_and_in_another_order_each_pass(texts, files):
    known = files["a"][2:] + files["b"] + files["c"][5:]
    assert texts("pretrain", SETS, "--no-shuffle", "--max-steps", 17, streaming=True) == known
    shuffled = texts("pretrain", SETS, "--max-steps", 34, streaming=True, name="shuffled")
    assert sorted(shuffled[:17]) == sorted(shuffled[17:]) == sorted(known)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_weight_says_how_often_rows_are_read(texts, files, streaming):
    sets = [SETS[0] | {"weight": 2}, SETS[1] | {"weight": 0.5}]
    read = texts("pretrain", sets, "--max-steps", 64, streaming=streaming)
    counts = {name: sum(text.startswith(name) for text in read[:48]) for name in "ab"}
    # Three passes of about 16 documents: 12 of a, and 4 of b, in a stream only on average.
    assert counts["a"] == 36 if not streaming else 30 <= counts["a"] <= 42
    assert counts["a"] + counts["b"] == 48 and counts["b"] > 0


def test_a_stream_of_weighed_sets_goes_on_where_it_was(texts, kit, tune, here, files):
    sets = [SETS[0] | {"weight": 1.5}, SETS[1]]
    texts("pretrain", sets, "--max-steps", 20, "--save-steps", 4, streaming=True, streaming_multipack_buffer_size=5)
    whole = kit.timeless(kit.metrics(here / "run"))
    again = ["pretrain", "--config", "run.yaml", "--output-dir", "run", *ONE, "--resume"]
    done = tune(*again, "run/checkpoints/step_000016", "--max-steps", 20)
    assert done.code == 0 and kit.timeless(kit.metrics(here / "run")) == whole
    (here / "run.yaml").write_text((here / "run.yaml").read_text().replace("1.5", "1.25"))
    kit.refused(tune(*again, "run/checkpoints/step_000020", "--max-steps", 24), "datasets .* instead of")


def test_rows_held_out_of_each_set_are_the_first_after_those_left_out(texts, kit, here, files):
    read = texts("pretrain", SETS[:2], "--no-shuffle", "--max-steps", 10, "--val-set-size", 2, streaming=True, eval_steps=99)
    held = files["a"][2:4] + files["b"][:2]
    assert read[:4] == held and read[4:14] == files["a"][4:] + files["b"][2:]


@pytest.fixture
def chats(kit, here):
    """chats.jsonl, and more.jsonl with rows of another format."""
    kit.write_rows(here / "chats.jsonl", kit.chats(12))
    kit.write_rows(here / "more.jsonl", [{"instruction": f"Add 1 to {i}.", "output": str(i + 1)} for i in range(6)])
    return [{"path": "chats.jsonl", "type": "chat_template", "roles_to_train": ["user", "assistant"]}, {"path": "more.jsonl"}]


def test_a_stream_of_chats_in_one_block_trains_on_what_memory_would(texts, kit, here, chats):
    args = ["--no-shuffle", "--max-steps", 18, "--adapter", "none"]
    assert texts("sft", chats, *args, streaming=True, name="stream") == texts("sft", chats, *args, name="memory")
    assert kit.same(kit.tensors(here / "stream/model/model.safetensors"), kit.tensors(here / "memory/model/model.safetensors"))


def test_a_stream_of_chats_goes_on_where_it_was_and_sees_what_has_changed(texts, kit, tune, here, chats):
    more = {"streaming": True, "streaming_multipack_buffer_size": 4, "lora_r": 4, "learning_rate": 0.01}
    texts("sft", chats, "--max-steps", 11, "--save-steps", 2, "--save-total-limit", 9, "--no-shuffle", **more)
    whole = kit.timeless(kit.metrics(here / "run"))
    again = ["sft", "--config", "run.yaml", "--output-dir", "run", *ONE, "--no-shuffle", "--resume"]
    assert tune(*again, "run/checkpoints/step_000006", "--max-steps", 11).code == 0
    assert kit.timeless(kit.metrics(here / "run")) == whole
    rows = [json.loads(line) for line in (here / "chats.jsonl").read_text().splitlines()]
    rows[9]["messages"][1]["content"] = "other"
    kit.write_rows(here / "chats.jsonl", rows)
    kit.refused(tune(*again, "run/checkpoints/step_000011", "--max-steps", 12), "rows that the run has read already are not there as they")


def test_a_set_whose_first_rows_are_all_left_out_is_told(texts, kit, tune, here, chats):
    kit.write_rows(here / "long.jsonl", [{"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}])
    texts("sft", [*chats, {"path": "long.jsonl"}], "--max-steps", 2, streaming=True)
    done = tune("sft", "--config", "run.yaml", "--max-steps", 2, *ONE)
    assert "! long.jsonl: none of its first 1 rows gives a document" in " ".join(done.out.split())


def test_a_stream_of_chats_evaluates_rows_of_its_own(texts, kit, tiny, here, chats):
    texts("sft", chats, "--max-steps", 2, "--val-set-size", 3, streaming=True)
    assert any("eval/loss" in record for record in kit.metrics(here / "run"))
    own = "def change(cfg, **kwargs):\n    return lambda example: {'messages': example['messages'][:2]}\n"
    (here / "mine.py").write_text(own)
    read = texts("sft", [{"path": "chats.jsonl", "type": "mine.py:change"}], "--max-steps", 12, "--no-shuffle", streaming=True, name="own")
    assert len(read) == 12 and not any("sure?" in text for text in read)


REFUSED = {
    "no steps": ("sft", {"streaming": True}, "streaming needs max_steps"),
    "kept rows": ("sft", {"streaming": True, "max_steps": 2, "dataset_prepared_path": "kept"}, "prepared-path would be ignored: the rows"),
    "duplicates": ("sft", {"streaming": True, "max_steps": 2, "dataset_exact_deduplication": True}, "deduplication would be ignored"),
    "a part": ("sft", {"streaming": True, "max_steps": 2, "val_set_size": 0.2}, "val-set-size would be ignored: 0.2 is a part"),
    "rows of an entry": (
        "sft", {"streaming": True, "max_steps": 2, "datasets": [{"path": "chats.jsonl", "limit": 3}]}, "chats.jsonl has limit, .*all rows"
    ),
    "options": (
        "sft", {"streaming": True, "max_steps": 2, "datasets": [{"path": "more.jsonl"}], "roles_to_train": ["user"]},
        "roles-to-train would be ignored: rows of format alpaca",
    ),
    "a bad row": ("sft", {"streaming": True, "max_steps": 2, "datasets": [{"path": "a.jsonl"}]}, "a.jsonl.*body"),
    "nothing left": ("pretrain", {"max_steps": 2, "datasets": [{"path": "b.jsonl", "skip": 8}]}, "skip 8 leaves out all 8 rows"),
    "two names": (
        "pretrain", {"max_steps": 2, "datasets": [{"path": "b.jsonl", "field": "a", "text_column": "b"}]}, "two names of one thing"
    ),
    "another type": (
        "pretrain", {"max_steps": 2, "datasets": [{"path": "b.jsonl", "type": "alpaca"}]}, "type must be one of completion, pretrain"
    ),
    "no such place": (
        "pretrain", {"max_steps": 2, "datasets": [{"path": "c.jsonl", "text_column": "said.when"}]}, "no field said.when; it has "
    ),
    "data too": (
        "pretrain", {"max_steps": 2, "datasets": [{"path": "b.jsonl"}], "data": ["a.jsonl"]}, "data would be ignored: datasets is given"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_sets_that_make_no_sense_are_one_line(what, kit, tune, tiny, here, files, chats):
    command, keys, words = REFUSED[what]
    (here / "run.yaml").write_text(yaml.safe_dump({"model": str(tiny.model), "sequence_len": 64, "datasets": chats} | keys))
    kit.refused(tune(command, "--config", "run.yaml"), words)
    assert not (here / "runs").exists()


def test_prompts_may_be_inside_other_columns(kit, tune, tiny, here):
    kit.write_rows(here / "rows.jsonl", [{"task": {"ask": f"{i} + 1 ="}, "answer": str(i + 1)} for i in range(4)])
    (here / "r.py").write_text("def reward(completions, answer, **kwargs):\n    return [0.0 for _ in completions]\n")
    args = ["--model", tiny.model, "--data", "rows.jsonl", "--reward-funcs", "r.py:reward", "--field-prompt", "task.ask"]
    done = tune("rollout", *args, "--num-generations", 2, "--max-completion-length", 2, "--num-prompts", 2)
    assert done.code == 0 and "0 + 1 =" in done.out, done.err
