import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.data import cache, columns, formats, pack, prompts, sources, spans, trees

REPORT = formats.TextReport._make(["chat", 3, 2, {"too long": 1}, *range(len(formats.TextReport._fields) - 4)])


def same(a, b):
    """Equal trees of arrays and plain values, types included."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return type(b) is dict and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def make_docs(count, seed=0):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 60, count)
    weight = [draw.choice([0.0, 1.0, 0.5], size).astype(np.float32) * (np.arange(size, dtype=np.float32) > 0) for size in sizes]
    return [
        spans.Doc(draw.integers(0, 50_000, size).astype(np.int32), w, i + 1) for i, (size, w) in enumerate(zip(sizes, weight, strict=True))
    ]


def test_documents_and_report_come_back(tmp_path):
    docs = make_docs(100)
    cache.save_entry(tmp_path, "k", docs, REPORT)
    back, report = cache.load_entry(tmp_path, "k")
    assert same(back, docs) and report == REPORT and type(report) is formats.TextReport
    assert not back[0].tokens.flags.writeable and not back[0].tokens.flags.owndata
    assert os.listdir(tmp_path) == ["k"] and cache.load_entry(tmp_path, "other") is None
    assert not any(path.suffix in (".pkl", ".pickle") for path in (tmp_path / "k").iterdir())
    batch, want = pack.collate(back[:5]), pack.collate(docs[:5])
    assert set(batch) == set(want) and all(batch[key].equal(want[key]) for key in want)


def test_no_documents_and_plain_reports(tmp_path):
    cache.save_entry(tmp_path, "k", [], {"a": [1, 2.5, None, True, {"b": "é"}], "r": [REPORT, REPORT]})
    assert cache.load_entry(tmp_path, "k") == ([], {"a": [1, 2.5, None, True, {"b": "é"}], "r": [REPORT, REPORT]})


ARRAYS = st.lists(st.integers(-5, 5), max_size=4).map(lambda x: np.array(x, dtype=np.int32))
NUMBERS = st.integers(-(2**62), 2**62)
FLOATS = ARRAYS.map(lambda x: x.astype(np.float32))
TURNS = st.tuples(NUMBERS, st.floats(0, 1)).map(lambda x: spans.Turn(x[0], 1, 2, 3, x[1], 0.5))
TEXTS = st.tuples(st.text(max_size=5), st.lists(TURNS, max_size=3), st.booleans(), st.none() | st.floats(0, 1)).map(
    lambda x: spans.Text(x[0], tuple(x[1]), whole=x[2], eos=x[3])
)
DOCS = st.tuples(ARRAYS, FLOATS, NUMBERS).map(lambda x: spans.Doc(*x))
EXTRAS = st.dictionaries(st.sampled_from("abc"), st.lists(st.floats(0, 1), max_size=2).map(tuple))
TREES = st.tuples(ARRAYS, FLOATS, NUMBERS, EXTRAS, st.none() | ARRAYS).map(lambda x: trees.TreeDoc(x[0], x[0], x[0], *x[1:]))
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats(0, 1) | st.text(max_size=2),
    lambda x: st.lists(x) | st.dictionaries(st.text(max_size=2), x),
    max_leaves=4,
)
MESSAGES = st.none() | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), PLAIN), max_size=2)
PROMPTS = st.tuples(ARRAYS, st.text(max_size=3), MESSAGES, st.dictionaries(st.text(max_size=2), PLAIN, max_size=3), NUMBERS).map(
    lambda x: prompts.Prompt(*x)
)
SHAPES = st.sampled_from([TEXTS, DOCS, TREES, PROMPTS, st.tuples(ARRAYS, st.lists(ARRAYS, max_size=3).map(tuple)), st.none() | DOCS])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SHAPES.flatmap(lambda shape: st.lists(shape, max_size=5)))
def test_any_tree_of_fields_comes_back(docs):
    schema, arrays = columns.to_columns(docs)
    assert same(columns.from_columns(json.loads(json.dumps(schema)), arrays), docs)


@pytest.mark.parametrize("docs", [[2**70, 1], [2**63, -1], [(2**63, -1)], [1, 1.0, True], [float("inf")], [{"a": 2**70}, {"b": [None]}]])
def test_odd_numbers_come_back(docs, tmp_path):
    cache.save_entry(tmp_path, "k", docs)
    assert same(cache.load_entry(tmp_path, "k")[0], docs)


@pytest.mark.parametrize(
    ("docs", "message"),
    [
        ([{1, 2}], "doc is of type set"),
        ([{"a": None, "b": (1,)}], "values None"),
        ([spans.Doc(np.zeros(1, np.int32), np.zeros(1), 0), spans.Doc(np.zeros(1, np.int64), np.zeros(1), 0)], "doc.tokens has arrays"),
        ([1, (1,)], "doc is of several types"),
        ([np.array(["a", None], dtype=object)], "several types or without an axis"),
        ([2**70, (1,)], "doc is of several types"),
    ],
)
def test_what_no_column_can_hold(docs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cache.save_entry(tmp_path, "k", docs)
    assert os.listdir(tmp_path) == []


def test_an_entry_cannot_name_classes_of_others(tmp_path):
    with pytest.raises(ValueError, match="no class of this package"):
        columns.report_from_json({"__fields_of__": "subprocess:Popen", "args": "true"})


@pytest.mark.parametrize(
    "damage", ["cut", "grown", "flipped", "gone", "header", "empty header", "no header", "other schema", "not a folder"]
)
def test_damaged_entries_are_seen_and_replaced(damage, tmp_path):
    docs = make_docs(20)
    folder = cache.save_entry(tmp_path, "k", docs, REPORT)
    data, header = folder / "doc.tokens.npy", folder / "header.json"
    match damage:
        case "cut":
            data.write_bytes(data.read_bytes()[:-4])
        case "grown":
            data.write_bytes(data.read_bytes() + b"\0" * 4)
        case "flipped":
            content = bytearray(data.read_bytes())
            content[-3] ^= 1
            data.write_bytes(content)
        case "gone":
            data.unlink()
        case "header":
            header.write_text(header.read_text().replace('"chat"', '"chaT"'))
        case "empty header":
            header.write_text("")
        case "no header":
            header.unlink()
        case "other schema":
            text = header.read_text().partition("\n")[2].replace("spans:Doc", "spans:Doe")
            header.write_text(cache.hashlib.sha256(text.encode()).hexdigest() + "\n" + text)
        case "not a folder":
            [path.unlink() for path in folder.iterdir()]
    assert cache.load_entry(tmp_path, "k") is None
    if damage == "other schema":
        return  # sums hold: only another version's code writes that, and its key differs
    cache.save_entry(tmp_path, "k", docs, REPORT)
    assert same(cache.load_entry(tmp_path, "k")[0], docs) and os.listdir(tmp_path) == ["k"]


def test_a_sound_entry_is_never_touched_again(tmp_path):
    folder = cache.save_entry(tmp_path, "k", make_docs(20), REPORT)
    before = os.stat(folder / "header.json").st_ino
    assert cache.save_entry(tmp_path, "k", make_docs(20), REPORT) == folder
    assert os.stat(folder / "header.json").st_ino == before and os.listdir(tmp_path) == ["k"]


RACE = """
import os, sys, time
from pathlib import Path
import numpy as np
from treetune.core.data import cache, spans
root, start = sys.argv[1], float(sys.argv[2])
docs = [spans.Doc(np.full(50, i, np.int32), np.ones(50, np.float32), i) for i in range(300)]
time.sleep(max(0.0, start - time.time()))
for turn in range(25):
    key = f"k{turn}"
    folder = Path(root) / key
    if turn % 3 == 0 and folder.is_dir():
        broken = Path(root) / f"broken-{os.getpid()}"
        broken.write_bytes(b"damage")
        try:
            os.replace(broken, folder / "doc.tokens.npy")  # not in place: a file that is mapped must not shrink
        except FileNotFoundError:
            broken.unlink()
    if cache.load_entry(root, key) is None:
        cache.save_entry(root, key, docs, {"turn": turn})
    found = cache.load_entry(root, key)
    if found is not None:
        assert found[1] == {"turn": turn} and len(found[0]) == 300
        assert all((doc.tokens == i).all() and doc.row == i for i, doc in enumerate(found[0]))
"""


@pytest.mark.more
def test_two_processes_race_for_the_same_entries(tmp_path):
    start = str(time.time() + 2.0)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), start], env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    for turn in range(25):
        if cache.load_entry(tmp_path, f"k{turn}") is None:
            assert turn % 3 == 0, "only an entry damaged on purpose may be unreadable"


def save_killed(root, at):
    """Save an entry in a process that is killed when it flushes a file for the `at`-th time."""
    real, calls = os.fsync, []

    def die(handle):
        calls.append(handle)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    if (child := os.fork()) == 0:
        try:
            os.fsync = die
            cache.save_entry(root, "k", [spans.Doc(np.ones(5, np.int32), np.ones(5, np.float32), 1)], None)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("at", [1, 6])
def test_a_killed_save_leaves_no_entry(at, tmp_path):
    save_killed(tmp_path, at)
    assert cache.load_entry(tmp_path, "k") is None
    docs = make_docs(3)
    cache.save_entry(tmp_path, "k", docs)
    assert same(cache.load_entry(tmp_path, "k")[0], docs)


def test_what_killed_processes_left_is_swept_after_a_day(tmp_path):
    """Those of versions before, which named no process; what another program called alike stays."""
    names = {"old": f".writing-{'a' * 64}-{'0' * 32}", "new": f".writing-{'b' * 64}-{'0' * 32}", "foreign": ".writing-letters"}
    for name, age in (("old", 2 * 86400), ("new", 60), ("foreign", 2 * 86400)):
        (tmp_path / names[name]).mkdir()
        os.utime(tmp_path / names[name], (time.time() - age,) * 2)
    cache.save_entry(tmp_path, "k", make_docs(2))
    assert sorted(os.listdir(tmp_path)) == sorted([names["new"], names["foreign"], "k"])


def test_what_a_killed_process_left_is_swept_at_once(tmp_path):
    save_killed(tmp_path, 6)
    assert os.listdir(tmp_path)
    cache.save_entry(tmp_path, "other", make_docs(2))
    assert os.listdir(tmp_path) == ["other"]


def test_a_damaged_entry_with_a_foreign_file_is_not_deleted(tmp_path):
    folder = cache.save_entry(tmp_path, "k", make_docs(2))
    (folder / "notes.txt").write_text("mine")
    (folder / cache.HEADER).write_text("broken")
    with pytest.raises(OSError, match="holds files that are not of this cache"):
        cache.save_entry(tmp_path, "k", make_docs(2))
    assert (folder / "notes.txt").read_text() == "mine"


# The key.

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
OPTIONS = {"sequence_len": 512, "roles": ["a", "b"], "val": 0.1, "nested": {"x": None}}


@pytest.fixture
def inputs(tmp_path, build_tokenizer, variants):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "hello"}\n' * 3)
    tokenizer = build_tokenizer(variants["byte"])
    tokenizer.chat_template = TEMPLATE
    own = tmp_path / "own.py"
    own.write_text("def read(row): return row\n")
    return path, tokenizer, own


def key_of(path, tokenizer, own, template=None, options=OPTIONS):
    return cache.entry_key(
        data=[sources.digest_source(str(path))], tokenizer=tokenizer, template=template, options=options, code=[str(own)]
    )


def test_every_input_changes_the_key(inputs, build_tokenizer, variants, monkeypatch):
    path, tokenizer, own = inputs
    keys = {"base": key_of(*inputs)}
    assert key_of(*inputs) == keys["base"] and len(keys["base"]) == 64
    keys["template"] = key_of(*inputs, template="other")
    for name, options in {
        "value": OPTIONS | {"sequence_len": 513},
        "type": OPTIONS | {"sequence_len": 512.0},
        "text": OPTIONS | {"sequence_len": "512"},
        "order": OPTIONS | {"roles": ["b", "a"]},
        "more": OPTIONS | {"more": None},
        "deep": OPTIONS | {"nested": {"x": False}},
    }.items():
        keys[f"option {name}"] = key_of(*inputs, options=options)
    for name in ("byte_no_bos", "byte_adds_bos", "byte_pad_is_eos", "byte_rstrip", "byte_trim", "meta_first", "byte_unmarked"):
        other = build_tokenizer(variants[name])
        other.chat_template = TEMPLATE
        keys[name] = key_of(path, other, own)
    for name, change in {
        "chat template": lambda t: setattr(t, "chat_template", TEMPLATE + " "),
        "eos": lambda t: setattr(t, "eos_token", "<s>"),
        "added token": lambda t: t.add_tokens(["<extra>"]),
        "special token": lambda t: t.add_special_tokens({"additional_special_tokens": ["<more>"]}),
    }.items():
        other = build_tokenizer(variants["byte"])
        other.chat_template = TEMPLATE
        change(other)
        keys[name] = key_of(path, other, own)
    text = own.read_text()
    own.write_text(text + "#\n")
    keys["own code"] = key_of(*inputs)
    own.write_text(text)
    monkeypatch.setattr(cache, "code_digest", lambda: "other")
    keys["code"] = key_of(*inputs)
    monkeypatch.undo()
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "0")
    keys["libraries"] = key_of(*inputs)
    assert len(set(keys.values())) == len(keys), keys


def test_what_does_not_matter_keeps_the_key(inputs, tmp_path):
    path, tokenizer, own = inputs
    base = key_of(*inputs)
    tokenizer(["hello", "hello you"], padding=True, truncation=True, max_length=3)
    tokenizer.name_or_path = "somewhere else"
    moved = tmp_path / "b.jsonl"
    path.rename(moved)
    assert key_of(moved, tokenizer, own, options=dict(reversed(OPTIONS.items()))) == base


def test_options_must_be_plain(inputs):
    with pytest.raises(ValueError, match=r"options.fn is of type function"):
        key_of(*inputs, options={"fn": key_of})


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from(["flip", "drop", "insert", "swap", "append"]))
def test_any_change_of_the_data_changes_its_digest(tmp_path_factory, seed, change):
    draw = random.Random(seed)
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    data = bytearray(b"".join(b'{"text": "row %d"}\n' % i for i in range(5)))
    path.write_bytes(data)
    before, original, at = sources.digest_source(str(path)), bytes(data), draw.randrange(len(data) - 1)
    match change:
        case "flip":
            data[at] ^= 1 << draw.randrange(8)
        case "drop":
            del data[at]
        case "insert":
            data.insert(at, draw.randrange(256))
        case "swap":
            data[at], data[at + 1] = data[at + 1], data[at]
        case "append":
            data += b"\n"
    path.write_bytes(data)
    assert (sources.digest_source(str(path)) == before) == (bytes(data) == original)


def test_the_code_digest_sees_every_file(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "t.jinja").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    seen = {cache.code_digest(tmp_path)}
    (tmp_path / "notes.md").write_text("y")
    assert cache.code_digest(tmp_path) in seen
    for name, text in (("a.py", "a = 2\n"), ("t.jinja", "y"), ("b.py", "")):
        (tmp_path / name).write_text(text)
        seen.add(cache.code_digest(tmp_path))
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    seen.add(cache.code_digest(tmp_path))
    assert len(seen) == 5
    assert {path.name for path in cache.Path(cache.__file__).parent.glob("*.py")} >= {"cache.py", "spans.py", "formats.py"}
