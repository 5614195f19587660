"""Models of transformers on ranks that have parts of them: gradients are those of whole weights, and a layer travels as one message."""

import importlib.util
import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("bridged_worker.py")
# Latent attention and experts; keys and values that go from layer to layer; parallel blocks with biases.
KINDS = ("deepseek_v3", "gemma4_text", "gpt_neox")
ALONE = "roberta-prelayernorm"  # which reads one document after another


def _architectures():
    spec = importlib.util.spec_from_file_location("architectures", Path(__file__).parents[1] / "models" / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_ranks_compute_bridged_layers_from_one_message_each(launch, tmp_path):
    for kind in (*KINDS, ALONE):
        _architectures().save(kind, tmp_path / kind)
    launch(2, WORKER, tmp_path, *KINDS, ALONE, cwd=tmp_path)
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert zero.keys() == one.keys() == {*KINDS, ALONE}
    for kind, by_remat in zero.items():
        for remat, found in by_remat.items():
            assert found["error"] <= 1e-5 and found["uneven"] <= 1e-5, (kind, remat)
            if kind == ALONE:
                continue  # a message a layer and document
            assert found["messages"] == one[kind][remat]["messages"]
            gathers, sums = ([int(layer) for name, layer in found["messages"] if name == wanted] for wanted in ("gather", "sum"))
            last = max(gathers)
            assert gathers == [*range(last + 1), *range(last, -1, -1)] and sums == [*range(last, -1, -1)], (kind, remat, gathers, sums)
