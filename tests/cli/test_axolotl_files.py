"""Every YAML file of axolotl's documents: read as it is, and run for two steps with a tiny model and a few rows in the place of its own.

`python tests/cli/test_axolotl_files.py --write` writes the table of docs/axolotl.md.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = sorted((Path(__file__).parent / "axolotl").glob("*.yaml"))
PAGE = Path(__file__).parents[2] / "docs" / "axolotl.md"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"
FAST = ("colab", "gs", "kto", "orpo", "guide_ebft_0", "examples_model_configs_9", "agents_pretraining_1")
LISTS = (
    "guide_rlhf_additions_2", "guide_rlhf_additions_3", "guide_vllm_serving_0", "guide_vllm_serving_2", "guide_grpo_5", "guide_grpo_6",
    "guide_grpo_13",
)  # fmt: skip
# Functions that the files name, as users have them beside their file.
REWARDS = """
def accuracy_reward(completions, **kwargs):
    return [float(len(text) % 3) for text in completions]
format_reward = length_penalty = accuracy_reward
def transform(cfg, **kwargs):
    def transform_fn(example, tokenizer=None):
        talk = [{"role": "user", "content": example["question"]}, {"role": "assistant", "content": example["answer"]}]
        return {"messages": talk}
    return transform_fn, {"remove_columns": ["question", "answer"]}
def prompt_transform(cfg, **kwargs):
    def transform_fn(example, tokenizer=None):
        return {"prompt": [{"role": "user", "content": example["question"]}], "answer": example["answer"]}
    return transform_fn, {"remove_columns": ["question"]}
"""


def talk(i: int, *, roles: str = "role", texts: str = "content") -> list[dict]:
    return [{roles: "user", texts: f"{i} + {i % 7}"}, {roles: "assistant", texts: str(i + i % 7)}]


ROWS: dict[str, Any] = {
    "alpaca": lambda i: {"instruction": f"Add 1 to {i}.", "output": str(i + 1)},
    "completion": lambda i: {"text": f"Line {i}. " + "the cat sat. " * (1 + i % 4)},
    "input_output": lambda i: {"segments": [{"label": False, "text": f"{i} is "}, {"label": True, "text": "a number"}]},
    "stepwise_supervised": lambda i: {"prompt": f"{i} + 1", "completions": ["think", str(i + 1)], "labels": [True, i % 2 == 0]},
    "bradley_terry.chat_template": lambda i: {"input": f"{i} + 1", "chosen": str(i + 1), "rejected": "no"},
    "chatml.intel": lambda i: {"system": "sums", "question": f"{i} + 1", "chosen": str(i + 1), "rejected": "no"},
    "chatml": lambda i: {"prompt": f"{i} + 1", "chosen": str(i + 1), "rejected": "no"},
    "chat_template.argilla": lambda i: {"chosen": talk(i), "rejected": [talk(i)[0], {"role": "assistant", "content": "no"}]},
    "llama3.ultra": lambda i: {"prompt": f"{i} + 1", "completion": str(i + 1), "label": i % 2 == 0},
    "ebft_opencode.transform": lambda i: {"input": f"{i} + 1", "output": str(i + 1)},
    "ebft_strided_structured.transform": lambda i: {"input": f"{i} + 1 makes", "output": f"the sum is {i + 1}, as one adds them up"},
    "ebft_pretrain.transform": lambda i: {"text": f"Line {i}. " + "the cat sat on the mat. " * 4},
    "ebft_chat_multiturn.transform": lambda i: {"messages": talk(i) + talk(i + 1)},
    "rewards.prompt_transform": lambda i: {"question": f"{i} + 1", "answer": str(i + 1)},
}
ROWS["pretrain"] = ROWS["completion"]
# Rows where a file names no data set: those of the kind that its method reads.
BARE = {"grpo": {"path": "prompts.jsonl"}, "ebft": {"path": "pairs.jsonl", "type": "ebft_opencode.transform"}}


def swapped(keys: dict, model: str, place: Path) -> dict:
    """The file with the tiny model and local rows, two steps long and sampled from the model's own weights."""
    out = dict(keys) | {"base_model": model, "max_steps": 2, "output_dir": str(place / "out")}
    for name in ("datasets", "pretraining_dataset"):
        if keys.get(name):
            out[name] = [local(entry, place, f"{name}{i}") for i, entry in enumerate(keys[name])]
    if keys.get("trl"):
        out["trl"] = dict(keys["trl"]) | ({"use_vllm": False} if keys["trl"].get("use_vllm") else {})
    if keys.get("wandb_project"):
        out["use_wandb"] = False  # its package is tested by `make test-trackers`
    if "reward_funcs" in out.get("trl", {}):
        out["trl"]["reward_funcs"] = ["rewards.length_penalty" if "/" in name else name for name in out["trl"]["reward_funcs"]]
    targets = out.get("lora_target_modules")
    if isinstance(targets, str):  # the tiny model has no tower beside it
        out["lora_target_modules"] = targets.replace("model.language_model.", "model.")
    (place / "rewards.py").write_text(REWARDS)
    (place / "your_module.py").write_text(REWARDS)
    if (out.get("trl") or {}).get("generation_kwargs"):
        out["trl"]["generation_kwargs"] = {"stop_token_ids": [7, 8]}  # the tiny vocabulary has no others
    return out


def local(entry: dict, place: Path, name: str) -> dict:
    entry = dict(entry)
    if entry["type"] == "chat_template":
        columns = entry.get("message_property_mappings") or {}
        roles = columns.get("role") or entry.get("message_field_role") or "role"
        texts = columns.get("content") or entry.get("message_field_content") or "content"
        rows = [{entry.get("field_messages", "messages"): talk(i, roles=roles, texts=texts)} for i in range(400)]
    else:
        row = ROWS["rewards.prompt_transform" if entry["type"] == "your_module.transform" else entry["type"]]
        rows = [row(i) for i in range(400)]
    file = place / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {key: value for key, value in entry.items() if key != "name"} | {"path": str(file)}


def run_in_process(args: list[str]) -> tuple[int, str, str]:
    from treetune.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(args)
    return code, out.getvalue(), err.getvalue()


def trained(file: Path, model: str, place: Path) -> dict:
    """The config of two steps of a file in this folder, which is the working folder."""
    keys = swapped(yaml.safe_load(file.read_text()), model, place)
    resolved, method = method_and_keys(file)
    if not keys.get("datasets") and not keys.get("pretraining_dataset"):
        kind = BARE.get(method, {"path": "rows.jsonl", "type": "completion"})
        keys["datasets"] = [local({"type": kind.get("type", "rewards.prompt_transform")} | kind, place, "rows")]
    (place / "run.yaml").write_text(yaml.safe_dump(keys))
    code, out, err = run_in_process(["train", "run.yaml"])
    assert code == 0, (file.name, out[-2000:], err[-2000:])
    records = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(record.get("step", 0) for record in records) == 2
    return yaml.safe_load((place / "out" / "config.yaml").read_text()) | {"_said": out, "_keys": keys, "_resolved": resolved}


def method_and_keys(file: Path) -> tuple[dict, str]:
    from treetune.cli import run_file
    from treetune.cli.methods import METHODS
    from treetune.core.config import table

    method = run_file.method_of(run_file.load(str(file)), str(file))
    return run_file.read(str(file), method, table.options(METHODS[method].config)).values, method


OPTIMIZERS = {"adamw_torch_fused": "adamw", "adamw_torch_8bit": "adamw_8bit", "adamw_torch_4bit": "adamw_4bit"}
# What the value of a key must be in the config of the run: written here by hand, beside the table of the code.
SEEN: dict[str, Any] = {
    "optimizer": lambda value, config: config["optimizer"] == OPTIMIZERS.get(value, value),
    "bf16": lambda value, config: config["dtype"] == ("bfloat16" if value is True else config["_keys"].get("torch_dtype", "auto")),
    "bnb_4bit_use_double_quant": lambda value, config: config["quant_double"] == value,
    "activation_offloading": lambda value, config: config["activation_offloading"] == "cpu",
    "torch_dtype": lambda value, config: config["dtype"] == value,
    "multi_objective_aggregation": lambda value, config: config["advantage"] == "gdpo",
    "lora_target_parameters": lambda value, config: config["lora_target_modules"][-len(value) :] == value,
    "load_in_4bit": lambda value, config: config["quant"] == "nf4",
    "adapter": lambda value, config: config["adapter"] == "lora" and (value != "qlora" or config["quant"] == "nf4"),
    "gradient_checkpointing": lambda value, config: config["gradient_checkpointing"] == "full",
    "lora_target_linear": lambda value, config: config["lora_target_modules"] == ["all-linear"],
    "lora_target_modules": lambda value, config: (
        config["lora_target_modules"][: len(value)] == value if isinstance(value, list) else value in config["lora_target_modules"][0]
    ),
    "special_tokens": lambda value, config: config["special_tokens"] == [f"{name}={text}" for name, text in value.items()],
    "loss_type": lambda value, config: config["loss"] == value,
    "scale_rewards": lambda value, config: config["advantage"] == "group_scaled",
    "chat_template": lambda value, config: config["chat_template"] == value,
    "rl": lambda value, config: config["method"] == value,
    "reward_model": lambda value, config: config["method"] == "reward",
    "process_reward_model": lambda value, config: config["method"] == "prm",
}
COUNTED = ("micro_batch_size", "gradient_accumulation_steps")  # completions where prompts are counted here
SWAPPED = ("base_model", "datasets", "pretraining_dataset", "max_steps", "output_dir", "use_vllm")


def unseen(keys: dict, config: dict) -> list[str]:
    """Keys of a file whose value the config of its run has not, and that the screen did not name as needless or left out."""
    said = set(re.findall(r"\w+", " ".join(line for line in config["_said"].splitlines() if line.startswith("  "))))
    flat = dict(keys)
    for section in ("trl", "ebft", "bnb_config_kwargs"):
        flat |= flat.pop(section, None) or {}
    missing = []
    for key, value in flat.items():
        if value in (None, False, [], {}) or key in SWAPPED or key in said or key == "vllm":
            continue
        if key in COUNTED and config["method"] in ("grpo", "ebft"):
            continue
        holds = SEEN[key](value, config) if key in SEEN else same(config.get(key), value)
        missing += [] if holds else [f"{key}: {value} is {config.get(key)}"]
    return missing


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, str):
        return ours == float(theirs)  # YAML reads 2e-5 as a text
    if isinstance(theirs, dict) and isinstance(ours, list):
        return {pair.partition("=")[0] for pair in ours} <= set(theirs)
    return ours == theirs or isinstance(theirs, int | float) and ours is not None and float(ours) == float(theirs)


@pytest.fixture(scope="session")
def model(tmp_path_factory, kit) -> str:
    return str(kit.write_model(tmp_path_factory.mktemp("axolotl") / "model", max_positions=8192))


@pytest.fixture(scope="session")
def experts(tmp_path_factory, kit) -> str:
    return str(kit.write_experts(tmp_path_factory.mktemp("axolotl") / "experts", max_positions=8192))


def row(file: Path, result: str) -> str:
    return f"| {file.stem} | {method_name(file)} | {result} |"


def method_name(file: Path) -> str:
    from treetune.cli import run_file

    return run_file.method_of(run_file.load(str(file)), file.name)


def listed(err: str) -> str:
    """The keys of the one error."""
    return "lists " + ", ".join(re.findall(r"(\w+) \(nearest:", err))


@pytest.mark.parametrize("file", FILES, ids=[one.stem for one in FILES])
def test_a_file_resolves_or_lists_what_is_missing(file, here):
    code, out, err = run_in_process(["train", str(file), "--dry-run"])
    assert not any(here.iterdir()), "a dry run writes nothing"
    if file.stem in LISTS:
        assert code == 2 and "not supported" in err and err.count("\n") == 1
    else:
        assert code == 0 and "nothing was loaded or written" in out, err
    assert row(file, listed(err) if code else "runs") in PAGE.read_text(), "python tests/cli/test_axolotl_files.py --write"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("file", [pytest.param(one, marks=[] if one.stem in FAST else pytest.mark.slow, id=one.stem)
                                  for one in FILES if one.stem not in LISTS])  # fmt: skip
def test_a_file_trains_and_its_keys_are_seen(file, here, model, experts):
    config = trained(file, experts if "lora_target_parameters" in file.read_text() else model, here)
    assert not unseen(config["_keys"], config)


def write() -> None:
    """Run every file and write the table into the page."""
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest

    rows = ["| file | command | result |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        model = str(conftest.write_model(Path(root) / "model", max_positions=8192))
        experts = str(conftest.write_experts(Path(root) / "experts", max_positions=8192))
        for file in FILES:
            place = Path(root) / file.stem
            place.mkdir()
            os.chdir(place)
            code, _, err = run_in_process(["train", str(file), "--dry-run"])
            result = listed(err) if code == 2 else "runs"
            if code == 0:
                config = trained(file, experts if "lora_target_parameters" in file.read_text() else model, place)
                assert not unseen(config["_keys"], config), (file, unseen(config["_keys"], config))
            rows.append(row(file, result))
            print(rows[-1], flush=True)
    counts = f"{len(FILES)} files: {sum('runs |' in one for one in rows)} run, {sum('| lists' in one for one in rows)} list."
    text = PAGE.read_text()
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{counts}\n\n" + "\n".join(rows) + f"\n{END}{tail}")


if __name__ == "__main__":
    write()
