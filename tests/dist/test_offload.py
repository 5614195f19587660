"""Parts of frozen layers in files, and moments in host memory, beside `--sharding full`: where they are, and the same numbers."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("torchrun_scene", HERE / "test_torchrun.py")
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)

# Half of each matrix of a layer is no smaller than what stays on the device.
SIZES = dict(vocab_size=257, hidden_size=64, mlp_size=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=128)
RUN = ["--model", "model", "--device", "cpu", "--max-steps", 3, "--gradient-accumulation-steps", 1, "--micro-batch-size", 1,
       "--val-set-size", 2, "--sharding", "full", "--sample-prompt", "", "--adam-epsilon", 1e-3]  # fmt: skip
SFT = ["sft", "--data", "text.jsonl", "--sequence-len", 64, "--no-sample-packing", "--lora-r", 3, *RUN]
DPO = ["dpo", "--data", "pairs.jsonl", "--sequence-len", 64, "--adapter", "none", *RUN]
AWAY = {"none": [], "disk": ["--layer-offloading", "disk", "--optim-args", "paged=true"]}
KINDS = {"sft": SFT, "sft, again": [*SFT, "--gradient-checkpointing", "full"], "dpo, all": DPO}


@pytest.fixture(scope="module")
def place(tmp_path_factory, launch):
    """A folder in which two ranks have looked and run."""
    from treetune.models import hf, llama

    root = tmp_path_factory.mktemp("offload")
    hf.save(root / "model", hf.random("llama", llama.Config(**SIZES, tied=True, init_std=0.2), seed=3), tokenizer=scene._tokenizer())
    rows = [f"Row {i}: " + "red blue green "[: 1 + 5 * i % 14] * (1 + i % 3) for i in range(10)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (root / "pairs.jsonl").write_text("".join(json.dumps({"prompt": "a", "chosen": row, "rejected": row[::-1]}) + "\n" for row in rows))
    runs = {f"{kind} {place}": list(map(str, [*args, *more])) for kind, args in KINDS.items() for place, more in AWAY.items()}
    (root / "runs.json").write_text(json.dumps(runs))
    launch(2, HERE / "offload_worker.py", root, cwd=root)
    return root


@pytest.mark.more
def test_parts_of_layers_are_in_files_and_come_with_their_message(place):
    for rank in (json.loads((place / f"rank{number}.json").read_text()) for number in range(2)):
        assert rank["none"][0] == 0 and rank["disk"][0] == rank["disk"][1] > 0, "all that is not small"
        assert rank["same"] and rank["whole"] and rank["stays"]
        send = ["copy", "sent", "drop"]
        assert rank["order"] == [*send, "layer 0", *send, "layer 1", *send, "layer 2"], (
            "each when the layer before it is asked for, which then computes"
        )


@pytest.mark.more
@pytest.mark.parametrize("kind", KINDS)
def test_runs_leave_the_bits_of_parts_on_the_device(place, kind):
    file = "model/model.safetensors" if kind == "dpo, all" else "adapter/adapter_model.safetensors"
    here, away = (load_file(place / f"{kind} {where}" / file) for where in AWAY)
    assert here.keys() == away.keys() and all((leaf == away[name]).all() for name, leaf in here.items())
