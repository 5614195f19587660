"""Two ranks train an adapter of each kind as one process does, with leaves whole and sharded."""

import pytest
from safetensors.torch import load_file

from treetune.core.run.ranks import ALONE

MODES = ("none", "full")
ATOL = 1e-7  # beside numbers that are all but 0


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    launch(2, "kinds", folder)
    return folder


@pytest.mark.more
@pytest.mark.slow
def test_weights_moments_and_a_base_that_moves_are_those_of_one_process(two, scene):
    for name in scene.KINDS:
        one = scene.kind(name, ALONE, "none")
        trained = [path for path in one if path.startswith("state.params.")]
        # A is drawn again, and B is 0, after a restart: one step has moved them.
        assert all((one[path] - one[path.replace("state.params", "start")]).norm() > 1e-4 for path in trained), name
        for mode in MODES:
            got = load_file(two / f"{mode}-{name}.safetensors")
            assert got.keys() == one.keys()
            for path, want in one.items():
                assert (got[path] - want).norm() <= 1e-5 * want.norm() + ATOL, f"{name}, {mode}: {path}"
        if "relora" in name:
            start = dict(scene.tree.items(scene.model().params))
            moved = {path for path in start if (one[f"frozen.{path}"] - start[path]).norm() > 1e-4}
            assert moved == {path for path in start if path.endswith("_proj")}
