"""Two ranks give the step of one for strided rollouts, whole and sharded, and where a rank has no document or no block."""

import importlib.util
from pathlib import Path

import pytest
from safetensors.torch import load_file

from treetune.core.run.ranks import ALONE

WORKER = Path(__file__).with_name("strided_worker.py")
spec = importlib.util.spec_from_file_location("strided_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def found(launch, tmp_path_factory):
    """(what one rank finds, what two find)."""
    folder = tmp_path_factory.mktemp("strided")
    launch(2, WORKER, folder, cwd=folder)
    return worker.cases(ALONE), load_file(folder / "two.safetensors")


@pytest.mark.more
@pytest.mark.parametrize("deal", ["ragged", "a rank without documents"])
@pytest.mark.parametrize("name", worker.CASES)
def test_two_ranks_give_the_step_of_one(found, name, deal):
    """Gradients in float64; metrics are reported in float32."""
    one, two = ({key: leaf for key, leaf in side.items() if key.startswith(f"{name}/{deal}/")} for side in found)
    assert one.keys() == two.keys() and len(one) > 10
    for key, leaf in one.items():
        if "/gradient/" in key:
            assert leaf.norm() > 0 and (two[key] - leaf).norm() <= 1e-10 * leaf.norm(), key
        else:
            assert two[key].item() == pytest.approx(leaf.item(), rel=1e-6, abs=1e-6), key
    assert one[f"{name}/{deal}/metric/ebft/num_blocks"] == 8
