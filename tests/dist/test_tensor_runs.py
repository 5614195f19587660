"""`--shard tensor=2`: every method trains as one process does, with weights whole beside it or sharded, and leaves the files of one."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from treetune.cli import main

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("torchrun_scene", HERE / "test_torchrun.py")
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)

SIZES = dict(vocab_size=257, hidden_size=24, mlp_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=512)
LORA, FULL = ("--lora-r", 3, "--learning-rate", 0.02), ("--adapter", "none", "--learning-rate", 0.001)
SAMPLED = ("--num-generations", 4, "--max-completion-length", 6)
# name -> (command, model, options, what is sharded along data on four ranks)
RUNS = {
    "sft": ("sft", "llama", (*LORA, "--lora-dropout", 0.1, "--data", "texts.jsonl"), "none"),
    "grpo": ("grpo", "llama", (*LORA, "--data", "prompts.jsonl", "--beta", 0.1, *SAMPLED, "--reward-funcs", "rewards.py:length"), "full"),
    "experts": ("sft", "qwen3_moe", (*FULL, "--data", "texts.jsonl", "--router-aux-loss-coef", 0.01,
                                     "--gradient-checkpointing", "selective"), "full"),
    "sft, all": ("sft", "llama", (*FULL, "--data", "texts.jsonl", "--z-loss-coef", 1e-3, "--label-smoothing", 0.1), "full"),
    "dora": ("sft", "llama", (*LORA, "--lora-dora", "--lora-dropout", 0.1, "--lora-modules-to-save", "lm_head",
                               "--data", "texts.jsonl"), "full"),
    "pissa": ("sft", "llama", (*LORA, "--lora-init", "pissa", "--data", "texts.jsonl"), "none"),
    "dpo": ("dpo", "llama", (*LORA, "--data", "pairs.jsonl"), "full"),
    "dpo, all": ("dpo", "llama", (*FULL, "--data", "pairs.jsonl"), "none"),
    "kto": ("kto", "llama", (*LORA, "--data", "judged.jsonl"), "none"),
    "reward": ("reward", "llama", (*LORA, "--data", "pairs.jsonl"), "full"),
    "grpo, all": ("grpo", "llama", (*FULL, "--data", "prompts.jsonl", *SAMPLED, "--reward-funcs", "rewards.py:length"), "none"),
    "ebft": ("ebft", "llama", (*LORA, "--data", "answers.jsonl", *SAMPLED), "full"),
    "ebft, strided": ("ebft", "llama", (*FULL, "--mode", "strided", "--data", "texts.jsonl", "--stride", 4, "--context-length", 4,
                                        "--generate-max-len", 3, "--n-samples-per-prompt", 3), "none"),
}  # fmt: skip
FAST = ("sft", "grpo", "experts")
REWARDS = """
def length(completions, completion_ids):
    with open("calls.txt", "a") as file:
        file.write(f"{len(completions)}\\n")
    return [len(one) / 8 + sum(map(ord, text)) % 5 / 4 for one, text in zip(completion_ids, completions)]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny models and rows for every method."""
    from treetune.models import hf, llama, moe

    root = tmp_path_factory.mktemp("tensor_runs")
    dense, sparse = llama.Config(**SIZES, tied=True, init_std=0.2), moe.Experts(4, 2, 10, (1,))
    hf.save(root / "llama", hf.random("llama", dense, seed=3), tokenizer=scene._tokenizer())
    experts = llama.Config(**SIZES, init_std=0.2, qk_norm=True, experts=sparse)
    hf.save(root / "qwen3_moe", hf.random("qwen3_moe", experts, seed=4), tokenizer=scene._tokenizer())
    words = ["red blue green "[: 1 + 5 * i % 14] for i in range(24)]
    rows = {
        "texts": [{"text": f"Row {i}: {word * (1 + i % 4)}"} for i, word in enumerate(words)],
        "prompts": [{"prompt": f"Row {i}: {word}"} for i, word in enumerate(words)],
        "answers": [{"prompt": f"Row {i}:", "ground_truth": f" {word}"} for i, word in enumerate(words)],
        "pairs": [{"prompt": f"Row {i}:", "chosen": f" {word}", "rejected": " no" * (1 + i % 3)} for i, word in enumerate(words)],
        "judged": [{"prompt": f"Row {i}:", "completion": f" {word}", "label": i % 3 > 0} for i, word in enumerate(words)],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "rewards.py").write_text(REWARDS)
    return root


def arguments(name: str, output: str, accumulation: int, *more) -> list[str]:
    command, model, options, _ = RUNS[name]
    basic = {
        "model": model, "output-dir": output, "gradient-accumulation-steps": accumulation, "micro-batch-size": 2 if command == "kto" else 1,
        "max-steps": 3, "device": "cpu", "val-set-size": 4, "save-steps": 2,
    } | {"sft": {"sample-prompt": "Row", "sample-tokens": 3}, "reward": {}}.get(command, {"sample-prompt": ""})  # fmt: skip
    return [command, *(f"--{name}={value}" for name, value in basic.items()), *map(str, options), *more]


@pytest.fixture(scope="module")
def runs(place, launch):
    """runs(axes, names) -> (folder of the runs of one process, of ranks on a mesh of two or four), made once for each set of names."""
    made = {}

    def get(axes: str, names: tuple[str, ...]) -> tuple[Path, Path]:
        if (axes, names) not in made:
            made[axes, names] = _make(place, launch, axes, names)
        return made[axes, names]

    return get


def _make(place, launch, axes: str, names: tuple[str, ...]) -> tuple[Path, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in names:
            if not (place / "alone" / name).exists():
                assert main.main(arguments(name, f"alone/{name}", 4)) == 0, name
        alone = place.joinpath("calls.txt").read_text() if place.joinpath("calls.txt").exists() else ""
    accumulation, folder = (2 if "data" in axes else 4), f"on {axes}"
    wanted = []
    for name in names:
        mesh = ("--shard", axes, "--sharding", RUNS[name][3] if "data" in axes else "none")
        wanted.append(arguments(name, f"{folder}/{name}", accumulation, *mesh))
    resumed = arguments(names[0], f"{folder}/resumed", accumulation, "--resume", f"alone/{names[0]}/checkpoints/step_000002")
    wanted.append([*resumed, *wanted[0][wanted[0].index("--shard") :]])
    (place / "wanted.json").write_text(json.dumps(wanted))
    place.joinpath("calls.txt").unlink(missing_ok=True)
    launch(4 if "," in axes else 2, HERE / "runs_worker.py", place / "wanted.json", cwd=place)
    if axes == "tensor=2" and "grpo" in names:
        assert place.joinpath("calls.txt").read_text() == alone, "one rank of two with the same rows asks what rewards cost"
    return place / "alone", place / folder


def _records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


CLOCK = ("second", "memory", "tokens_per_second")
OWN = ("rollout/", "sampling/", "epoch")  # of a rank's own prompts
SLOW = tuple(name for name in RUNS if name not in FAST)
CONTEXT = ("sft", "experts", "dora", "dpo, all", "grpo", "ebft, strided")
CASES = [("tensor=2", FAST, name) for name in FAST] + [pytest.param("tensor=2", SLOW, name, marks=pytest.mark.slow) for name in SLOW]
CASES += [pytest.param("tensor=2,data=2", tuple(RUNS), name, marks=pytest.mark.slow) for name in RUNS]
CASES += [pytest.param("tensor=2,context=2", CONTEXT, name, marks=pytest.mark.slow) for name in CONTEXT]


@pytest.mark.more
@pytest.mark.parametrize(("axes", "names", "name"), CASES)
def test_ranks_that_split_layers_leave_what_one_process_leaves(runs, axes, names, name):
    alone, split = (folder / name for folder in runs(axes, names))
    file = "model/model.safetensors" if "all" in name or name in ("experts", "ebft, strided") else "adapter/adapter_model.safetensors"
    one, other = load_file(alone / file), load_file(split / file)
    assert one.keys() == other.keys() and max(leaf.abs().max() for leaf in one.values()) > 1e-2
    for path, leaf in one.items():
        assert leaf.shape == other[path].shape and (leaf - other[path]).abs().max() <= 2e-5, path
    for mine, theirs in zip(_records(alone), _records(split), strict=True):
        for key in (key for key in mine if not any(word in key for word in CLOCK) and not key.startswith(OWN)):
            assert mine[key] is theirs[key] is None or mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=2e-5), key
    if RUNS[name][0] == "sft":
        assert (alone / "samples.jsonl").read_text() == (split / "samples.jsonl").read_text()


@pytest.mark.more
def test_a_run_goes_on_on_another_mesh(runs, place, monkeypatch):
    """From one process to ranks that split layers, and back."""
    monkeypatch.chdir(place)
    alone, split = runs("tensor=2", FAST)
    again = arguments("sft", "joined", 4, "--resume", str(split / "sft/checkpoints/step_000002"))
    assert main.main(again) == 0
    one = load_file(alone / "sft/adapter/adapter_model.safetensors")
    for run in (split / "resumed", place / "joined"):
        other = load_file(run / "adapter/adapter_model.safetensors")
        assert one.keys() == other.keys() and all((leaf - other[path]).abs().max() <= 2e-5 for path, leaf in one.items())


REFUSED = {
    "fp8_products": ("--quant", "fp8", "--fp8-products"), "sharding moments": ("--sharding", "moments"),
    "optimizer muon": ("--optimizer", "muon"),
    "optimizer adamw_8bit": ("--optimizer", "adamw_8bit"), "layer_offloading cpu": ("--layer-offloading", "cpu"),
    "lora_init corda": ("--lora-init", "corda"), "relora_steps": ("--relora-steps", 2), "qat int8": ("--adapter", "none", "--qat", "int8"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_split_layers_is_refused_before_anything_starts(place, capsys, monkeypatch, what):
    monkeypatch.chdir(place)
    line = ["sft", "--model", "llama", "--data", "texts.jsonl", "--output-dir", "never", "--nproc", "4", "--shard", "tensor=2,data=2"]
    assert main.main([*line, *map(str, REFUSED[what])]) == 2
    said = capsys.readouterr().err
    assert f"{what} does not go with shard tensor=2: " in said and said.count("\n") == 1 and not (place / "never").exists()


def test_a_model_that_does_not_divide_is_refused(place, launch, monkeypatch):
    from treetune.core import partition, shard
    from treetune.models import hf, llama, loading, tensor_rules

    cfg = llama.Config(**SIZES | {"num_kv_heads": 1}, tied=True)
    hf.save(place / "odd", hf.random("llama", cfg, seed=3))
    monkeypatch.setattr(shard, "size", lambda mesh, axis: 2)
    home = partition.Partition(None, tensor_rules.dimension)
    with pytest.raises(ValueError, match="shard tensor=2 does not fit .*odd: this model has 1 key/value heads, which do not divide by 2"):
        loading.load_model(place / "odd", device="cpu", home=home)
