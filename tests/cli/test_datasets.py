"""`datasets` and `test_datasets` of a config file: data sets with options of their own."""

import json

import pytest
import yaml

from treetune.core import manifest
from treetune.core.data import dataset

PAIRS = [{"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i + 5}, or so"} for i in range(8)]


@pytest.fixture
def config(here):
    def write(**keys):
        (here / "run.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
        return "run.yaml"

    return write


def base(tiny):
    return {"model": str(tiny.model), "sequence_len": 256}


def test_each_data_set_has_its_own_type_and_options(tune, tiny, config):
    chats = {"path": str(tiny.chat), "type": "chat_template", "roles_to_train": ["user"], "limit": 4}
    file = config(model=str(tiny.model), datasets=[chats, {"path": str(tiny.alpaca), "type": "alpaca"}])
    done = tune("preprocess", "--config", file)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert "chat: 4 rows" in lines[0] and "alpaca: 12 rows" in lines[1]
    rows = [json.loads(line) for line in tiny.chat.read_text().splitlines()[:4]]
    asked = sum(len(m["content"]) + 1 for row in rows for m in row["messages"] if m["role"] == "user")
    alone = tune("preprocess", "--config", config(model=str(tiny.model), datasets=[chats]))
    assert f"of which {asked} supervised" in alone.out


def test_a_run_trains_on_the_list_and_its_config_reads_back(tune, tiny, config, here):
    sets = [{"path": str(tiny.chat), "limit": 8}, {"path": str(tiny.alpaca)}]
    file = config(**base(tiny), datasets=sets, test_datasets=[{"path": str(tiny.chat), "limit": 3}], max_steps=2, sample_prompt="")
    done = tune("sft", "--config", file, "--output-dir", "one")
    assert done.code == 0, done.err
    written = yaml.safe_load((here / "one" / "config.yaml").read_text())
    assert written["datasets"] == sets and written["data"] == []  # not the sample rows of the default, which nobody has read
    again = tune("sft", "--config", "one/config.yaml", "--output-dir", "two")
    assert again.code == 0, again.err
    losses = [[json.loads(x).get("train/loss") for x in (here / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "two")]
    assert losses[0] == losses[1] and len(losses[0]) >= 3
    # A checkpoint of a version that named the sample goes on.
    (checkpoint,) = (here / "one" / "checkpoints").glob("step_*")
    record = checkpoint / "state.json"
    assert '"data": []' in record.read_text()
    record.write_text(record.read_text().replace('"data": []', '"data": ["sample.jsonl"]'))
    manifest.write(checkpoint)
    done = tune("sft", "--config", file, "--max-steps", "3", "--resume", "auto", "--output-dir", "one")
    assert done.code == 0, done.err


OWN = (
    "def chats(cfg, **kwargs):\n"
    "    def transform(example, tokenizer=None):\n"
    "        return {'messages': example['messages'][-2:], 'said': cfg['path']}\n"
    "    return transform, {'remove_columns': '__all__'}\n"
)


def test_a_transform_of_ones_own_is_named_by_its_import_path(tune, tiny, config, here):
    (here / "mine.py").write_text(OWN)
    entry = {"path": str(tiny.chat), "type": "mine.chats", "roles_to_train": ["user"]}
    keys = {"model": str(tiny.model), "datasets": [entry], "dataset_prepared_path": "prepared"}
    done = tune("preprocess", "--config", config(**keys))
    assert done.code == 0 and "chat: 24 rows" in done.out, done.err
    assert "(prepared earlier)" in tune("preprocess", "--config", config(**keys)).out
    (here / "other.py").write_text(OWN.replace("[-2:]", "[:1]"))
    changed = tune("preprocess", "--config", config(**keys | {"datasets": [entry | {"type": "other.py:chats"}]}))
    assert changed.code == 0 and "(prepared earlier)" not in changed.out.splitlines()[0]
    with_options = tune("preprocess", "--config", config(**keys | {"datasets": [entry | {"type": "mine.py:chats?level=3"}]}))
    assert with_options.code == 0 and "chat: 24 rows" in with_options.out, with_options.err
    wrong = tune("preprocess", "--config", config(**keys | {"datasets": [entry | {"type": "mine.absent"}]}))
    assert wrong.code == 2 and "mine has no function absent" in wrong.err


@pytest.mark.parametrize(
    ("datasets", "said"),
    [
        ([{"type": "chat"}], "must be a list of mappings with a path each"),
        ("rows.jsonl", "must be a list of mappings with a path each"),
        ([{"path": "CHAT", "rolez": ["user"]}], "unknown key rolez (did you mean roles?)"),
        ([{"path": "CHAT", "type": "nonsense"}], "unknown format 'nonsense'"),
        ([{"path": "nowhere.jsonl"}], "nowhere.jsonl"),
    ],
)
def test_a_bad_list_is_one_line(tune, tiny, config, datasets, said):
    if isinstance(datasets, list):
        datasets = [{key: str(tiny.chat) if value == "CHAT" else value for key, value in entry.items()} for entry in datasets]
    done = tune("preprocess", "--config", config(model=str(tiny.model), datasets=datasets))
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err


def test_options_that_the_list_replaces_are_refused(tune, tiny, config):
    file = config(model=str(tiny.model), datasets=[{"path": str(tiny.chat)}])
    done = tune("preprocess", "--config", file, "--data", tiny.chat)
    assert done.code == 2 and "--data would be ignored: datasets is given" in done.err
    assert tune("sft", "--config", file, "--data", tiny.chat, "--dry-run").err == done.err
    done = tune("preprocess", "--datasets", "x")
    assert done.code == 2 and "write it in a file" in done.err


def test_weights_repeat_rows_within_an_epoch(tune, tiny, config, here):
    def steps(weight):
        sets = [{"path": str(tiny.chat), "limit": 8, "weight": weight}]
        file = config(**base(tiny), datasets=sets, val_set_size=0, sample_prompt="", sample_packing=False, micro_batch_size=2)
        done = tune("sft", "--config", file, "--gradient-accumulation-steps", 1, "--output-dir", f"run-{weight}")
        assert done.code == 0, done.err
        return len((here / f"run-{weight}" / "metrics.jsonl").read_text().splitlines())

    assert (steps(1), steps(2), steps(0.5)) == (4, 8, 2)
    file = config(model=str(tiny.model), datasets=[{"path": str(tiny.chat), "weight": 0}])
    assert "weight must be a number above 0" in tune("preprocess", "--config", file).err


def test_an_entry_may_say_where_its_rows_are(tune, config, tiny):
    """Every option of `sources.read` is a key of an entry."""
    sets = [{"path": str(tiny.chat), "split": "train[:6]", "ds_type": "json", "shards": 2, "shard_index": 0, "skip": 1, "limit": 2}]
    done = tune("preprocess", "--config", config(model=str(tiny.model), datasets=sets))
    assert done.code == 0 and "documents  2," in done.out, done.err
    assert {"split", "name", "revision", "data_files", "ds_type", "shards", "shard_index", "skip", "limit"} == dataset.SOURCE_KEYS


def test_repeated_rows_go_and_are_counted(tune, tiny):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, tiny.chat, "--dataset-exact-deduplication")
    rows = len(tiny.chat.read_text().splitlines())
    assert f"{rows} repeated rows left out" in done.out and f"documents  {rows}," in done.out


def test_prepared_rows_are_found_again_and_only_when_nothing_changed(tune, tiny, here):
    def prepared(*args):
        done = tune("preprocess", "--model", tiny.model, "--data", "rows.jsonl", "--dataset-prepared-path", "kept", *args)
        assert done.code == 0, done.err
        return "(prepared earlier)" in done.out, done.out.replace(" (prepared earlier)", "").split("time")[0]

    (here / "rows.jsonl").write_text(tiny.chat.read_text())
    (first, shown), (second, again) = prepared(), prepared()
    assert (first, second) == (False, True) and shown == again
    assert prepared("--train-on-eos", "all")[0] is False and prepared("--sequence-len", 100)[0] is False
    (here / "rows.jsonl").write_text(tiny.chat.read_text().replace("please", "quickly"))
    assert prepared()[0] is False
    (here / "rows.jsonl").write_text(tiny.chat.read_text())
    assert prepared()[0] is True


@pytest.mark.parametrize(
    ("entry", "rows"),
    [
        ({"type": "input_output"}, [{"segments": [{"text": "a b ", "label": False}, {"text": "c<|im_end|>", "label": True}]}]),
        ({"type": None}, [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]),
        ({"type": {"field_instruction": "q", "field_output": "a", "no_input_format": "Q: {instruction}\nA:"}}, [{"q": "one", "a": " two"}]),
        ({"type": "jeopardy"}, [{"question": "It is wet", "category": "rain", "answer": "water"}]),
        ({"type": "chat_template", "field_messages": "talk", "chat_template": "chatml"}, [{"talk": [{"from": "gpt", "value": "hello"}]}]),
    ],
)
def test_other_formats_by_type(tune, tiny, config, here, entry, rows):
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tune("preprocess", "--config", config(model=str(tiny.model), datasets=[{"path": "rows.jsonl", **entry}]))
    assert done.code == 0, done.err
    assert "1 rows -> 1 documents" in done.out


def test_pairs_from_several_data_sets_each_in_its_format(tune, tiny, config, here, kit):
    asked = [{"question": f"{row['prompt']}?", "chosen": row["chosen"], "rejected": row["rejected"]} for row in PAIRS]
    said = [{"talk": row["prompt"], "yes": row["chosen"], "no": row["rejected"]} for row in PAIRS]
    for name, rows in (("plain", PAIRS), ("asked", asked), ("said", said)):
        kit.write_rows(here / f"{name}.jsonl", rows)
    sets = [
        {"path": "plain.jsonl", "limit": 3},
        {"path": "asked.jsonl", "type": "chatml.intel"},
        {"path": "said.jsonl", "type": "chat_template", "field_messages": "talk", "field_chosen": "yes", "field_rejected": "no"},
        {
            "path": "said.jsonl",
            "type": {"field_prompt": "talk", "field_chosen": "yes", "field_rejected": "no", "prompt_format": "Q{prompt}"},
        },
    ]
    done = tune("preprocess", "--method", "dpo", "--config", config(model=str(tiny.model), datasets=sets))
    assert done.code == 0, done.err
    read = ["passthrough: 3 rows", "chatml.intel: 8 rows", "chat_template.default: 8 rows", "user_defined.default: 8 rows"]
    assert all(text in line for text, line in zip(read, done.out.splitlines(), strict=False))
    assert "documents  27," in done.out


def test_data_sets_that_cannot_share_a_batch(tune, tiny, config, here, kit):
    kit.write_rows(here / "plain.jsonl", PAIRS)
    kit.write_rows(here / "margin.jsonl", [row | {"margin": 1} for row in PAIRS])
    keys = {"model": str(tiny.model), "datasets": [{"path": "plain.jsonl"}, {"path": "margin.jsonl"}]}
    done = tune("preprocess", "--method", "dpo", "--config", config(**keys))
    assert done.code == 2 and "margin.jsonl and plain.jsonl: only one has the field margin" in done.err


def test_a_transform_may_give_pairs(tune, tiny, config, here):
    own = "def pairs(cfg):\n    return lambda example, tokenizer=None: {'prompt': 'Say ', 'chosen': 'yes', 'rejected': 'no'}, {}\n"
    (here / "mine.py").write_text(own.replace("{}\n", "{'remove_columns': '__all__'}\n"))
    keys = {"model": str(tiny.model), "datasets": [{"path": str(tiny.text), "type": "mine.py:pairs"}]}
    done = tune("preprocess", "--method", "dpo", "--config", config(**keys))
    assert done.code == 0 and "passthrough: 16 rows -> 16 documents" in done.out, done.err


def test_messages_may_be_inside_other_columns(tune, tiny, config, kit, here):
    rows = kit.chats(6)
    kit.write_rows(here / "rows.jsonl", [{"data": {"talk": {"turns": row["messages"]}, "id": i}} for i, row in enumerate(rows)])
    kit.write_rows(here / "plain.jsonl", rows)
    inside = {"path": "rows.jsonl", "type": "chat_template", "field_messages": "data.talk.turns"}
    plain = {"path": "plain.jsonl", "type": "sharegpt"}
    seen = [tune("preprocess", "--config", config(model=str(tiny.model), datasets=[one])) for one in (inside, plain)]
    assert [one.code for one in seen] == [0, 0], seen[0].err + seen[1].err
    assert seen[0].out.replace("rows.jsonl", "plain.jsonl") == seen[1].out
    kit.refused(tune("preprocess", "--config", config(model=str(tiny.model), datasets=[inside | {"field_messages": "data.talk.turn"}])),
        "rows.jsonl line 1 has no field data.talk.turn")  # fmt: skip
