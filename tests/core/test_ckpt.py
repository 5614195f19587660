import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from treetune.core import ckpt, ckpt_parts, manifest, optim, step, tree
from treetune.core.state import TrainState


def _state(fill: float = 1.0, *, at: int = 7, width: int = 3) -> TrainState:
    gen = torch.Generator().manual_seed(int(fill * 10))
    shapes = {"model": {"layers": [{"w": (4, width)}, {"w": (4, width)}], "norm": (width,)}, "lora": {"layers": [{}, {"q": {"A": (2, 3)}}]}}
    params = tree.map(lambda shape: torch.randn(shape, generator=gen), shapes)
    params["model"]["layers"][1]["w"] = params["model"]["layers"][1]["w"].bfloat16()
    odd = {
        "count": torch.tensor(3.5),
        "flag": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "view": torch.randn(4, 6, generator=gen).T[::2],
    }
    opt = {"mu": tree.map(lambda leaf: leaf * 1e-30, params)}
    return TrainState(params, {"model": {"base": torch.ones(2)}}, opt, odd, torch.tensor(at))


def _bits(state: TrainState) -> dict:
    return dict(tree.items({"params": state.params, "opt": state.opt, "extra": state.extra, "step": state.step}))


def _same(one: TrainState, other: TrainState) -> None:
    one, other = _bits(one), _bits(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype and torch.equal(leaf, other[path]), path


def test_round_trip_is_bit_exact(tmp_path):
    state, meta = _state(), {"base_digest": "abc", "progress": {"cursor": [0, 4], "best_loss": None}}
    path = ckpt.save(tmp_path, state, meta)
    assert path == tmp_path / "step_000007"
    loaded, found = ckpt.load(path, _state(2.0, at=0), base_digest="abc")
    _same(loaded, state)
    assert found == {"format": 2, "step": 7, **meta} and loaded.frozen["model"]["base"].tolist() == [1, 1]
    # Loaded leaves own their memory: an update in place must not reach the file or another leaf.
    places = [leaf.data_ptr() for leaf in tree.leaves(loaded.params)]
    assert len(set(places)) == len(places)


def test_a_state_is_read_into_place(tmp_path):
    state, start = _state(), _state(2.0, at=0)
    places = {name: leaf.data_ptr() for name, leaf in _bits(start).items() if name != "step"}
    loaded, _ = ckpt.load(ckpt.save(tmp_path, state, {}), start, in_place=True)
    _same(loaded, state)
    assert places == {name: leaf.data_ptr() for name, leaf in _bits(loaded).items() if name != "step"}


def test_only_safetensors_and_json_are_written(tmp_path):
    path = ckpt.save(tmp_path, _state(), {})
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.safetensors", manifest.NAME]
    json.loads((path / "state.json").read_text())
    source = Path(ckpt.__file__).read_text()
    assert not re.search(r"torch\.(load|save)\b|import pickle", source)


def test_a_loaded_state_continues_bit_for_bit(tmp_path, model, adapter, objective, documents, batch, start):
    base = model()
    used, optimizer, docs = adapter(base), optim.adamw(weight_decay=0.1), documents()
    one = step.make_step(objective(base, used), optimizer, schedule=optim.warmup(optim.cosine(0.05, 6), 2))
    steps = [[batch(docs[i % 4 :]), batch(docs[: 1 + i % 3])] for i in range(6)]
    state = start({"lora": used.tree}, {"model": base.params}, optimizer)
    for cut in steps[:3]:
        state, _ = one(state, cut)
    path = ckpt.save(tmp_path, state, {})
    for cut in steps[3:]:
        state, _ = one(state, cut)
    resumed, _ = ckpt.load(path, start({"lora": used.tree}, {"model": base.params}, optimizer))
    for cut in steps[3:]:
        resumed, _ = one(resumed, cut)
    _same(resumed, state)


@pytest.mark.parametrize(
    "like, words",
    [
        (
            lambda s: s._replace(params={"model": s.params["model"]}),
            r"params\.lora\.layers\.1\.q\.A is in the checkpoint but not in this run",
        ),
        (lambda s: s._replace(extra=s.extra | {"more": torch.zeros(1)}), r"extra\.more is in this run but not in the checkpoint"),
        (lambda s: _state(width=5), r"params\.model\.layers\.0\.w has shape \(4, 3\) there and \(4, 5\) here"),
    ],
)
def test_another_model_is_refused_naming_the_leaf(tmp_path, like, words):
    path = ckpt.save(tmp_path, _state(), {})
    with pytest.raises(ValueError, match=words):
        ckpt.load(path, like(_state()))


def test_another_base_is_refused(tmp_path):
    path = ckpt.save(tmp_path, _state(), {"base_digest": ckpt.digest({"w": torch.ones(3)})})
    ckpt.load(path, _state(), base_digest=ckpt.digest({"w": torch.ones(3)}))
    with pytest.raises(ValueError, match="trained on another base model"):
        ckpt.load(path, _state(), base_digest=ckpt.digest({"w": torch.ones(3) * (1 + 2**-23)}))


def test_digest_sees_paths_shapes_dtypes_and_bytes_only():
    base = {"a": torch.arange(6.0), "b": torch.tensor(2)}
    found = ckpt.digest(base)
    assert found == ckpt.digest({"b": torch.tensor(2), "a": torch.arange(12.0)[::2].clone() / 2})
    assert found == ckpt.digest({"b": torch.tensor(2), "a": torch.stack([torch.arange(6.0)] * 2, 1)[:, 0]})  # strides do not count
    others = [{"c": base["a"], "b": base["b"]}, {**base, "a": base["a"].view(2, 3)}, {**base, "a": -base["a"]}]
    others.append({**base, "b": torch.tensor(2.0)})
    assert len({found, *map(ckpt.digest, others)}) == 5


@pytest.mark.parametrize("broken", ["missing", "empty", "format"])
def test_what_is_not_a_checkpoint_is_refused(tmp_path, broken):
    path = tmp_path / "step_000001"
    if broken != "missing":
        path.mkdir()
    if broken == "format":
        (path / "state.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has checkpoint format 99" if broken == "format" else "is not a checkpoint"):
        ckpt.read_meta(path)


def test_steps_are_in_order_and_drafts_do_not_count(tmp_path):
    assert ckpt.steps(tmp_path / "none") == []
    for at in (999_999, 2, 1_000_000, 30):
        ckpt.save(tmp_path, _state(at=at), {})
    for name in (".step_000040.123", "step_000050", "step_x", "step_000060.old"):
        (tmp_path / name).mkdir()
    assert [path.name for path in ckpt.steps(tmp_path)] == ["step_000002", "step_000030", "step_999999", "step_1000000"]


KEPT = [(2, None, [3, 4]), (2, 1, [1, 3, 4]), (1, 4, [4]), (None, None, [1, 2, 3, 4]), (9, 1, [1, 2, 3, 4]), (0, 2, [2, 4])]


@pytest.mark.parametrize("keep, best, left", KEPT)
def test_prune_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    paths = {at: ckpt.save(tmp_path, _state(at=at), {}) for at in (1, 2, 3, 4)}
    (tmp_path / ".step_000005.4194305").mkdir()  # a number that no process can have
    gone = ckpt.prune(tmp_path, keep, best=None if best is None else paths[best])
    assert ckpt.steps(tmp_path) == [paths[at] for at in left] and {*gone} == {*paths.values()} - {paths[at] for at in left}
    assert not (tmp_path / ".step_000005.4194305").exists()


def test_saving_again_replaces(tmp_path):
    ckpt.save(tmp_path, _state(1.0), {})
    path = ckpt.save(tmp_path, _state(2.0), {})
    _same(ckpt.load(path, _state(3.0))[0], _state(2.0))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_several_threads_give_the_digest_of_one(monkeypatch):
    params = _state().params
    alone = ckpt.leaf_digest(params)
    monkeypatch.setattr(manifest, "SMALL", 0)
    assert ckpt.leaf_digest(params) == alone != ckpt.leaf_digest(_state(2.0).params)


OLD = {"step_000005": [1.0], "step_000010": [1.0]}


@pytest.mark.parametrize("mode", ["again", pytest.param("new", marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints(tmp_path, mode):
    """Signal 9 before each thing that a save does to the disk; see crash.py for what a line holds."""
    script = Path(__file__).with_name("crash.py")
    done = subprocess.run([sys.executable, script, tmp_path / "runs", mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) > 8 and lines[-1]["ended"] and lines[0]["found"] == OLD
    after = {"step_000005": [1.0], "step_000010": [2.0]} if mode == "again" else OLD | {"step_000020": [2.0]}
    found = [line["found"] for line in lines]
    assert found[-1] == after and all(one in (OLD, after) for one in found)
    assert all(line["left"] == [] for line in lines), "recover removes what a crash left"


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(tmp_path):
    """A limit on file size stands in for the full disk: writes fail with an error, as they would."""
    old = ckpt.save(tmp_path, _state(1.0, at=1), {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(ckpt.SaveError, match=r"could not save .*step_000002.*before it are intact"):
            ckpt.save(tmp_path, _state(2.0, at=2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == [old.name]
    _same(ckpt.load(old, _state(3.0))[0], _state(1.0, at=1))
    assert isinstance(ckpt.SaveError(), OSError)


def test_parts_are_read_by_slices_and_a_part_that_is_not_there_is_said(tmp_path):
    """A box of a leaf in parts: rows 1 to 3 and columns 2 to 4 of two files; then without the second."""
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    shapes = {"params.w": (4, 6)}
    boxes = {"params.w": [(0, 0), (4, 3)]}, {"params.w": [(0, 3), (4, 3)]}
    written = []
    for number, leaf in enumerate((whole[:, :3], whole[:, 3:])):
        own = ckpt_parts.Own({"params.w": ckpt_parts.Part(leaf, (0, 3 * number))}, shapes, True)
        written.append(ckpt_parts.write(tmp_path, ckpt_parts.file_name(own, number, 2), own))
        assert written[-1]["boxes"] == boxes[number]
    ckpt_parts.write_index(tmp_path, shapes, written)
    with ckpt_parts.reading(tmp_path, "fix") as saved:
        assert torch.equal(saved.read("params.w", torch.empty(4, 6, dtype=torch.float64)), whole.double())
        box = saved.leaves["params.w"].boxes[1]
        theirs, ours = ckpt_parts.overlap(box, (1, 2), (2, 2))
        assert torch.equal(whole[:, 3:][theirs], whole[1:3, 2:4][ours]) and whole[:, 3:][theirs].shape == (2, 1)
    ckpt_parts.write_index(tmp_path, shapes, written[:1])
    with (
        pytest.raises(ValueError, match=r"state.index.json is damaged \(params.w is not whole\)"),
        ckpt_parts.reading(tmp_path, "") as saved,
    ):
        saved.read("params.w", whole)
    (tmp_path / "state-00001-of-00002.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="state.index.json is damaged .*: fix"), ckpt_parts.reading(tmp_path, "fix") as saved:
        saved.read("params.w", torch.empty(4, 3))
