"""Two ranks give what one rank gives: gradients, weights, metrics, checkpoints. The ranks have unequal, sometimes no, tokens."""

import importlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from treetune.core import ckpt, manifest, tree
from treetune.core.run.ranks import ALONE
from treetune.core.state import TrainState

MODES = ("none", "moments", "gradients", "full")
TRAINS = ("full", "lora", "both")
WORKER = Path(__file__).with_name("worker.py")


class Runs(NamedTuple):
    """Results of one rank in this process, by what trained, and the folder that several ranks filled."""

    one: dict
    folder: Path


def _prepare(scene, folder: Path) -> Runs:
    one = {}
    for trains in TRAINS:
        one[trains], state, _ = scene.run(trains, ALONE, "none")
        ckpt.save(folder / "one" / trains, state, {"base_digest": ""})
    return Runs(one, folder)


@pytest.fixture(scope="module")
def runs(scene, launch, tmp_path_factory):
    found = _prepare(scene, tmp_path_factory.mktemp("ranks"))
    launch(2, WORKER, "train", found.folder, cwd=found.folder)
    return found


def _results(runs: Runs, mode: str, trains: str) -> tuple[dict, dict]:
    return runs.one[trains], load_file(runs.folder / f"{mode}-{trains}.safetensors")


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_those_of_one_rank(runs, mode, trains):
    """The first step's to 1e-6; later ones start from weights that already differ by rounding."""
    one, two = _results(runs, mode, trains)
    names = [name for name in one if name.startswith("gradient.")]
    assert names and one.keys() == two.keys()
    for name in names:
        assert one[name].norm() > 0 and _error(two[name], one[name]) <= (1e-6 if ".0." in name[:11] else 5e-6), name


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("mode", MODES)
def test_weights_after_three_steps_equal_those_of_one_rank(runs, scene, mode, trains):
    one, two = _results(runs, mode, trains)
    start = {f"state.params.{path}": leaf for path, leaf in tree.items(scene.trees(scene.model(), trains).params)}
    for name, leaf in start.items():
        assert _error(two[name], one[name]) <= 1e-6, name
        assert (one[name] - leaf).norm() > 1e-3, f"{name} moved"
    for name in one.keys() - start.keys():
        if name.startswith("state.opt"):
            assert _error(two[name], one[name]) <= 1e-5, name


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("mode", MODES)
def test_metrics_are_global(runs, mode, trains):
    """Loss, accuracy and counts over all ranks; one norm, and the clip that follows from it."""
    one, two = _results(runs, mode, trains)
    for name in (name for name in one if name.startswith("metric.")):
        assert two[name].item() == pytest.approx(one[name].item(), rel=1e-6, abs=1e-12), name
    for number, tokens in enumerate((17 + 3 + 29 + 2 + 21, 5 + 12 + 8 + 3 + 29 + 21, 17 + 12 + 2)):
        assert two[f"metric.{number}.num_tokens"] == tokens
        parts = [leaf.square().sum() for name, leaf in two.items() if name.startswith(f"gradient.{number}.")]
        limit = min(0.5, two[f"metric.{number}.grad_norm"].item())
        assert torch.stack(parts).sum().sqrt().item() == pytest.approx(limit, rel=1e-5)


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_two_ranks_loads_on_one_bit_for_bit(runs, scene, mode, trains):
    _, two = _results(runs, mode, trains)
    path = runs.folder / f"{mode}-{trains}" / "step_000003"
    loaded, meta = ckpt.load(path, scene.like(scene.model(), trains, ALONE, "none"))
    assert meta["step"] == 3
    for name, leaf in scene.whole(loaded).items():
        assert torch.equal(leaf, two[name]), name


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_one_rank_loads_on_two_bit_for_bit(runs, mode, trains):
    found = load_file(runs.folder / f"{mode}-{trains}.loaded.safetensors")
    assert found.keys() == {name for name in runs.one[trains] if name.startswith("state.")}
    assert all(torch.equal(leaf, runs.one[trains][name]) for name, leaf in found.items())


def test_each_rank_writes_its_parts_alone(runs):
    """The files of ranks have each number once; the leaves of an unsharded run are in one file."""
    for trains in TRAINS:
        whole, parts = (runs.folder / f"{mode}-{trains}" / "step_000003" for mode in ("none", "full"))
        assert sorted(path.name for path in whole.iterdir()) == ["state.json", "state.safetensors", manifest.NAME]
        files = [parts / f"state-0000{i}-of-00002.safetensors" for i in (1, 2)]
        names = {path.name for path in files}
        assert {path.name for path in parts.iterdir()} == names | {"state.index.json", "state.json", manifest.NAME}
        size = lambda path: sum(leaf.nbytes for leaf in load_file(path).values())  # noqa: E731
        assert sum(map(size, files)) == size(whole / "state.safetensors")
        assert trains == "lora" or max(map(size, files)) < 0.6 * sum(map(size, files))  # a row of rank 1 is on one of them


def test_a_checkpoint_is_read_with_any_sharding_and_mesh(runs, scene):
    """Parts as whole leaves and the other way round; splits along any dimension, on several axes, with equal parts written once."""
    for rank in _ranks(runs):
        assert len(rank["crossed"]) == 12 and not any(rank["crossed"].values())
        assert rank["meshes"]["wrong"] == []
        full = rank["meshes"]["full"]
        assert full["left"] == ["step_000001"] and len(set(full["said"])) == 1 < len(full["said"])
        assert re.search(r"could not save .*step_000002: .*No space left on device; the checkpoints before it are intact", full["said"][0])
    _read_alone(scene, _ranks(runs)[0]["meshes"]["paths"])


DAMAGES = {
    "a part is missing": lambda path: (path / "state-00002-of-00002.safetensors").unlink(),
    "a part is cut": lambda path: os.truncate(path / "state-00002-of-00002.safetensors", 500),
    "no index": lambda path: (path / "state.index.json").unlink(),
    "an edited index": lambda path: (path / "state.index.json").write_text(
        (path / "state.index.json").read_text().replace("[0,[0", "[1,[0")
    ),
    "a further part": lambda path: (path / "state-00003-of-00003.safetensors").write_bytes(b""),
    "no manifest": lambda path: (path / manifest.NAME).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_and_the_checkpoint_before_is_found(runs, tmp_path, damage):
    saved = runs.folder / "full-full" / "step_000003"
    sound, damaged = tmp_path / "step_000003", tmp_path / "step_000004"
    for path in (sound, damaged):
        shutil.copytree(saved, path)
    DAMAGES[damage](damaged)
    found, faults = ckpt.newest_sound(tmp_path)
    assert found == sound and len(faults) == 1 and "step_000004" in faults[0]


def test_parts_are_the_files_of_a_checkpoint(runs, tmp_path):
    """They go with it, and what else lies there stays."""
    path = tmp_path / "step_000003"
    shutil.copytree(runs.folder / "full-full" / "step_000003", path)
    (path / "notes.md").write_text("mine")
    (path / manifest.NAME).unlink()  # by their names alone
    ckpt.remove(path)
    assert [left.name for left in path.iterdir()] == ["notes.md"]


def _read_alone(scene, paths: list[str]) -> None:
    """Checkpoints of all meshes hold the same, each number once."""
    start = scene.shapes()
    state = TrainState({name: torch.zeros_like(leaf) for name, leaf in start.items()}, {}, {}, {}, torch.tensor(0))
    for path in map(Path, paths):
        assert all(torch.equal(leaf, start[name]) for name, leaf in ckpt.load(path, state)[0].params.items())
        held = sum(leaf.nbytes for file in path.glob("*.safetensors") for leaf in load_file(file).values())
        assert held == sum(leaf.nbytes for leaf in start.values()), path


def _ranks(runs: Runs, world: int = 2) -> list[dict]:
    return [json.loads((runs.folder / f"rank{i}.json").read_text()) for i in range(world)]


def test_full_sharding_keeps_a_part_of_each_leaf(runs):
    zero, one = (rank["bytes"] for rank in _ranks(runs))
    assert zero["none"] == one["none"] == zero["full"] + one["full"]
    assert abs(zero["full"] - one["full"]) < 0.05 * zero["none"]
    assert zero["moments"] == zero["gradients"] == zero["none"]


def test_each_rank_has_the_moments_of_its_part(runs):
    zero, one = (rank["moments"] for rank in _ranks(runs))
    counts = 4 * 20  # one number a leaf, on every rank
    for mode in ("moments", "gradients", "full"):
        assert zero[mode] + one[mode] == zero["none"] + counts == one["none"] + counts
        assert abs(zero[mode] - one[mode]) < 0.05 * zero["none"]


@pytest.mark.parametrize("trains", TRAINS)
def test_whole_layers_do_not_wait_for_the_backward_pass(runs, trains):
    """They are gathered again, without rematerialisation too: the last of two and the last norm are kept."""
    for rank in _ranks(runs):
        made, alive = rank["alive"][trains]
        assert made >= 18 and alive <= (made - 1) // 2 + 1, (made, alive)


# Without rematerialisation too, layers come again in the backward pass.
PASSES = ("full, again", "full", "lora, again")


def _sent(runs: Runs, passes: str) -> list[tuple[str, str, int]]:
    """(kind, first leaf, bytes) of the messages and computations of a forward and backward pass, the same on all ranks."""
    zero, one = (rank["sent"][passes] for rank in _ranks(runs))
    assert zero == one
    return [tuple(event) for event in zero]


def _layers(events: list, kind: str) -> list[int]:
    """The layers whose messages there are, in order."""
    found = [what.split("layers.")[1] for name, what, _ in events if name == kind and "layers." in what]
    return [int(rest.split(".")[0]) for rest in found]


def test_no_whole_leaf_outlives_its_step(runs):
    for rank in _ranks(runs):
        made, left = rank["left"]
        assert made >= 18 and left == 0, (made, left)


@pytest.mark.parametrize("passes", PASSES)
def test_a_layer_is_two_gathers_and_one_sum(runs, passes):
    """The last one stays for the way back."""
    events = _sent(runs, passes)
    assert _layers(events, "gather") == [0, 1, 2, 1, 0] and _layers(events, "sum") == [2, 1, 0]
    others = [(kind, what.split(".")[-1]) for kind, what, _ in events if kind != "compute" and "layers." not in what]
    outside = [("gather", "embed_tokens"), ("gather", "norm"), ("gather", "lm_head")]
    summed = [] if "lora" in passes else [("sum", "lm_head"), ("sum", "norm"), ("sum", "embed_tokens")]
    assert others == outside + summed, "nothing else travels"


@pytest.mark.parametrize("passes", PASSES)
def test_weights_travel_in_the_compute_dtype_and_gradients_in_float32(runs, counting, passes):
    layer = sum(leaf.numel() for leaf in tree.leaves(counting.model().params["layers"][0]))
    adapter = 4 * sum(32 + size for size in (32, 16, 16, 32)) + 4 * (2 * (32 + 64) + 64 + 32)  # rank 4 on four matrices, and on three
    trained, gathered = (adapter, 2 * layer + 4 * adapter) if "lora" in passes else (layer, 2 * layer)
    events = _sent(runs, passes)
    assert {size for kind, what, size in events if kind == "gather" and "layers." in what} == {gathered}
    assert {size for kind, what, size in events if kind == "sum" and "layers." in what} == {4 * trained}


@pytest.mark.parametrize("passes", PASSES)
def test_the_next_layer_is_on_its_way_before_this_one_computes(runs, passes):
    events, forward = _sent(runs, passes), range(2)
    places = [i for i, (kind, what, _) in enumerate(events) if kind == "gather" and "layers." in what]
    computed = [i for i, (kind, *_) in enumerate(events) if kind == "compute"]
    assert [events[i][1][-1] for i in computed] == list("012210"[: len(computed)])
    assert all(places[layer + 1] < computed[layer] for layer in forward)
    if "again" in passes:  # layer 2, which is there, with layer 1 on its way; layer 1, with layer 0
        assert all(places[3 + i] < computed[3 + i] for i in forward)
    sums = [i for i, (kind, what, _) in enumerate(events) if kind == "sum" and "layers." in what]
    assert all(place < total for place, total in zip(places[3:], sums, strict=False)), "and before gradients leave"
    known = [(kind, what.split(".")[-1]) for kind, what, _ in events]
    first, norm, head = (known.index(("gather", name)) for name in ("embed_tokens", "norm", "lm_head"))
    assert first < places[0] < computed[0] and computed[1] < norm < head < computed[2], "before the first layer, beside the last"


@pytest.mark.parametrize(("gpus", "least"), [(8, 0.95), (64, 0.90)])
def test_messages_of_a_large_model_leave_devices_computing(runs, monkeypatch, gpus, least):
    """Full training of 8B parameters by the model of the links, with the messages of a pass as they are begun."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    overlap = importlib.import_module("overlap")
    events = _sent(runs, "many")
    assert len(_layers(events, "compute")) == 2 * overlap.LLAMA["num_layers"]
    found, after = overlap.predicted(events, gpus), overlap.predicted(_at_once(events), gpus)
    assert least <= found["efficiency"] < 1 and after["efficiency"] < least, (found, after)


def _at_once(events: list) -> list:
    """The same messages, each when its layer is about to compute."""
    out, waiting = [], {}
    for event in events:
        kind, what, _ = event
        layer = what.split("layers.")[1].split(".")[0] if "layers." in what else ""
        if kind == "gather" and layer:
            waiting[layer] = event
        else:
            out += [waiting.pop(layer)] if kind == "compute" and layer in waiting else []
            out.append(event)
    return out


def test_gradients_of_whole_weights_leave_a_layer_at_a_time(runs, counting):
    """Those of a layer while the one before it is computed again, in float32; embedding, norm and head by themselves."""
    events = [(kind, int(what[-1]) if kind == "compute" else size) for kind, what, size in _sent(runs, "copies")]
    sizes = {name: 4 * sum(leaf.numel() for leaf in tree.leaves({"": part})) for name, part in counting.model().params.items()}
    layer = ("allreduce_", sizes["layers"] // 3)
    ends = [("allreduce_", sizes[name]) for name in ("lm_head", "norm")]
    backward = [("compute", 2), layer, ("compute", 1), layer, ("compute", 0), layer]
    assert events == [("compute", i) for i in range(3)] + ends + backward + [("allreduce_", sizes["embed_tokens"])]


def test_gradients_of_parts_that_ranks_share_leave_a_layer_at_a_time(runs, counting):
    """Along `replicate`, when the sums along `data` have come, while the backward pass goes on."""
    events = _sent(runs, "hybrid")
    layers = 4 * sum(leaf.numel() for leaf in tree.leaves({"": counting.model().params["layers"]}))
    kinds = [(kind, what.split("layers.")[-1][0] if "layers." in what else "") for kind, what, _ in events]
    sums = [kinds.index(("sum", str(layer))) for layer in (2, 1, 0)]
    beyond = [i for i, (kind, _, size) in enumerate(events) if kind == "allreduce_" and size == layers // 3]
    again = [i for i, (kind, _) in enumerate(kinds) if kind == "compute"][3:]
    assert len(beyond) == 3 and all(own < other for own, other in zip(sums, beyond, strict=True))
    assert again[1] < beyond[0] < sums[1] and again[2] < beyond[1] < sums[2]
    assert sum(kind == "allreduce_" for kind, _ in kinds) == 3 + 3, "embedding, norm and head, and nothing else"


def test_gradients_of_a_hybrid_mesh_equal_those_of_one_rank(runs):
    """Of a tied model, whose embedding has two gradients."""
    two = load_file(runs.folder / "hybrid.safetensors")
    assert len(two) == 20
    for name, leaf in two.items():
        assert _error(leaf, runs.one["full"][f"gradient.0.{name}"]) <= 1e-6, name


def test_gradients_have_the_same_bits_whatever_is_kept(runs):
    for rank in _ranks(runs):
        assert all(rank["same"].values()) and rank["wide"], (rank["same"], rank["wide"])


def test_a_step_is_as_ever_after_an_error_in_the_one_before(runs):
    assert [rank["after"] for rank in _ranks(runs)] == [[True, True]] * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_row_on_one_rank_stops_all_and_is_named(runs, mode):
    zero, one = (rank["bad"][mode] for rank in _ranks(runs))
    assert all(found["skipped"] == 1 and found["same"] for found in (zero, one))
    assert one["text"] == "the loss of rows [4] is inf"
    assert "another rank" in zero["text"] and "rows" not in zero["text"], "innocent rows are not blamed"


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all(launch, tmp_path):
    """With nobody to end them: messages that are on their way hold no rank."""
    zero, one = launch(2, WORKER, "fail", tmp_path, cwd=tmp_path, timeout=60, code=1)
    assert "ArithmeticError: a bad row of one rank" in one and "Connection closed by peer" in zero


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data=4", "replicate=2,data=2"])
def test_four_ranks_save_and_load_bit_for_bit(scene, launch, tmp_path, axes):
    """Some ranks then hold no part of a rank-1 or rank-3 adapter."""
    runs = _prepare(scene, tmp_path)
    launch(4, WORKER, "train", tmp_path, axes, cwd=tmp_path)
    for mode in MODES:
        for trains in TRAINS:
            _, four = _results(runs, mode, trains)
            loaded, _ = ckpt.load(tmp_path / f"{mode}-{trains}" / "step_000003", scene.like(scene.model(), trains, ALONE, "none"))
            assert all(torch.equal(leaf, four[name]) for name, leaf in scene.whole(loaded).items())
            back = load_file(tmp_path / f"{mode}-{trains}.loaded.safetensors")
            assert all(torch.equal(leaf, runs.one[trains][name]) for name, leaf in back.items())
            assert all(_error(four[name], leaf) <= 1e-6 for name, leaf in runs.one[trains].items() if ".params." in name)
    for rank in _ranks(runs, 4):
        assert not any(rank["crossed"].values()) and rank["meshes"]["wrong"] == []
    _read_alone(scene, _ranks(runs, 4)[0]["meshes"]["paths"])
    for world in (2, 3):
        launch(world, WORKER, "again", tmp_path, cwd=tmp_path)
        again = [json.loads((tmp_path / f"again{world}-{rank}.json").read_text()) for rank in range(world)]
        assert all(len(found) == 48 and not any(found.values()) for found in again)


def test_a_rank_that_dies_while_saving_ends_the_job_and_leaves_the_last_checkpoint(scene, torchrun, tmp_path):
    done = torchrun(2, WORKER, "die", tmp_path, cwd=tmp_path)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert [path.name for path in ckpt.steps(tmp_path / "runs")] == ["step_000000"]
    state, _ = scene.start(scene.model(), "full", ALONE, "none")
    loaded, _ = ckpt.load(tmp_path / "runs" / "step_000000", state)
    base = scene.model().params
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(loaded.params["model"]), tree.leaves(base), strict=True))
