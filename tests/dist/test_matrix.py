"""Every method on every mesh: several ranks log what one process logs and leave what it leaves, with unequal and with empty ranks."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
CLOCK = ("second", "memory", "tokens_per_second")


def _module(name: str):
    spec = importlib.util.spec_from_file_location(f"dist_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix = _module("matrix")
# Each kind of weights, each sharding and a stream that ranks share, once; the rest is slow.
SOME = [
    "kto full gradients data=2", "reward qlora moments data=2", "ebft lora full data=2", "dpo lora none context=2",
    "grpo full none context=2",
    "grpo-judge lora full data=2",
]  # fmt: skip
OF_NETS = [(method, "full") for method in matrix.NETS]
MESHES = {
    "data=2": [(method, what) for method in matrix.METHODS for what in matrix.SHARDINGS] + OF_NETS,
    "context=2": [(method, "none") for method in matrix.METHODS],
    "data=4": [(method, what) for method in matrix.METHODS for what in ("gradients", "full")] + OF_NETS,
    "replicate=2,data=2": [(method, what) for method in matrix.METHODS for what in ("moments", "gradients", "full")],
    "tensor=2": [(method, "none") for method in matrix.METHODS],
    "tensor=2,data=2": [(method, what) for method in matrix.METHODS for what in ("none", "full")],
    "tensor=2,context=2": [(method, "none") for method in matrix.METHODS],
    "context=2,data=2": [(method, what) for method in matrix.METHODS for what in matrix.SHARDINGS] + OF_NETS,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("matrix")
    matrix.prepare(root, _module("test_torchrun")._tokenizer())
    return root


@pytest.fixture(scope="module")
def alone(place):
    """alone(method, what trains, ranks) -> the folder of a run of one process with as many micro-batches a step as those ranks have."""
    made = {}

    def of(method: str, trains: str, ranks: int) -> Path:
        results = place / f"alone{ranks}"
        run = results / f"{method}_{trains}"
        if (method, trains, ranks) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                matrix.run(f"{method} {trains}", results, ranks)
            made[method, trains, ranks] = run
            (run / "calls.txt").write_text(calls(place))
        return run

    return of


def calls(place: Path) -> str:
    """How many completions were scored at a time since this was asked last."""
    file = place / "calls.txt"
    text = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    return text


def weights(run: Path) -> dict:
    (file,) = [path for name in ("model", "adapter") for path in sorted((run / name).glob("*.safetensors"))]
    return load_file(file)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples(run: Path) -> list:
    """The completions of all steps, with what they are of."""
    file = run / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(row["step"], row["prompt"], row["answer"]) for row in rows]


def differences(one: Path, several: Path) -> list[str]:
    """What is not the same to 1e-5: numbers of steps and evaluations, weights; and completions that are not the same."""
    out = ["samples"] if samples(one) != samples(several) else []
    for mine, theirs in zip(records(one), records(several), strict=True):
        for key in mine.keys() | theirs.keys():
            if any(word in key for word in CLOCK):
                continue
            if key not in mine or key not in theirs:
                out.append(f"{key} is in one alone")
            elif mine[key] != theirs[key] and mine[key] != pytest.approx(theirs[key], rel=1e-5, abs=1e-5):
                out.append(f"{key}: {mine[key]} and {theirs[key]}")
    mine, theirs = weights(one), weights(several)
    assert mine.keys() == theirs.keys()
    return out + [name for name, leaf in mine.items() if (leaf - theirs[name]).abs().max() > 1e-5]


def sizes(axes: str) -> dict[str, int]:
    return {axis: int(size) for axis, size in (part.split("=") for part in axes.split(","))}


def check(place, alone, launch, results: str, cases: list[str]) -> None:
    """Run cases of one number of ranks and compare each with as many micro-batches a step in one process."""
    meshes = [sizes(case.split()[-1]) for case in cases]
    (ranks,) = {math.prod(mesh.values()) for mesh in meshes}
    launch(ranks, matrix.__file__, place, place / results, *cases, cwd=place, timeout=30 * 60)
    found, scored, wanted = {}, calls(place), ""
    for case, mesh in zip(cases, meshes, strict=True):
        rows = math.prod(size for axis, size in mesh.items() if axis in ("data", "replicate"))
        one = alone(*case.split()[:2], rows)
        found[case], wanted = differences(one, matrix.folder(place / results, case)), wanted + (one / "calls.txt").read_text()
    assert sum(map(int, scored.split())) == sum(map(int, wanted.split())), "of ranks with the same rows one scores completions"
    assert not {case: wrong for case, wrong in found.items() if wrong}


@pytest.mark.more
def test_some_of_each_on_two_ranks(place, alone, launch):
    check(place, alone, launch, "some", SOME)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
def test_every_method_on_every_mesh(place, alone, launch, axes):
    # Other weights on these two are cases of test_tensor_runs.py.
    trains = ["qlora-wide"] if axes in ("tensor=2", "tensor=2,data=2") else ["lora", "full", "qlora-wide" if "tensor" in axes else "qlora"]
    cases = [f"{method} {one} {what} {axes}" for method, what in MESHES[axes] for one in trains]
    check(place, alone, launch, axes.replace(",", "_"), cases)


@pytest.mark.slow
def test_a_run_has_the_same_bits_each_time(place, launch):
    cases = ["dpo full gradients data=2", "grpo lora full data=2", "sft full moments data=2", "kto lora none context=2"]
    for again in ("first", "second"):
        launch(2, matrix.__file__, place, place / again, *cases, cwd=place)
    for case in cases:
        one, two = (weights(matrix.folder(place / again, case)) for again in ("first", "second"))
        assert all((leaf == two[name]).all() for name, leaf in one.items())
