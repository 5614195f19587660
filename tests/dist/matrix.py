"""Short runs of every method through the command itself, one after another in the same processes.

argv: folder, folder of the results, cases such as "dpo lora full data=2" (method, what trains, sharding, axes of the mesh).
Rows have unequal lengths, and the last step of a pass has fewer micro-batches than there are ranks.
"""

import json
import os
import sys
from pathlib import Path

METHODS = ("sft", "dpo", "kto", "reward", "grpo", "ebft", "ebft-strided")
NETS = ("grpo-judge", "ebft-host")  # with a reward model of a folder; with the features of a copy in the memory of the host
# A model twice as wide moves twice as far at a learning rate, and what rounding leaves of its first step grows with that: half of it.
TRAINS = {"lora": ["--lora-r", 3], "full": ["--adapter", "none"], "qlora": ["--lora-r", 3, "--quant", "nf4"],
          "qlora-wide": ["--lora-r", 3, "--quant", "nf4", "--model", "wide", "--learning-rate", 0.005]}  # fmt: skip
SHARDINGS = ("none", "moments", "gradients", "full")
# What each method reads, and how it is asked for three steps.
ONLINE = ["--max-completion-length", 6, "--num-generations", 4, "--val-set-size", 0]
OWN = {
    "sft": ["--data", "text.jsonl", "--sequence-len", 64, "--no-sample-packing"], "dpo": ["--data", "pairs.jsonl", "--sequence-len", 64],
    "kto": ["--data", "judged.jsonl", "--sequence-len", 64], "reward": ["--data", "pairs.jsonl", "--sequence-len", 64],
    "grpo": ["--data", "prompts.jsonl", "--reward-funcs", "rewards.py:spread", "--reward-num-workers", 1, "--beta", 0.1, *ONLINE],
    "grpo-judge": ["--data", "prompts.jsonl", "--reward-funcs", "judge", "rewards.py:spread", "--reward-weights", 1, 0.25, *ONLINE],
    "ebft": ["--data", "answers.jsonl", "--chat-template", "chatml", *ONLINE],
    "ebft-host": ["--data", "answers.jsonl", "--chat-template", "chatml", "--feature-device", "cpu", *ONLINE],
    "ebft-strided": ["--mode", "strided", "--data", "text.jsonl", "--sequence-len", 64, "--stride", 4, "--context-length", 4,
                     "--generate-max-len", 3, "--n-samples-per-prompt", 3],
}  # fmt: skip


REWARDS = """
def spread(completions):
    with open("calls.txt", "a") as file:
        file.write(f"{len(completions)}\\n")
    return [sum(map(ord, one)) % 5 / 4 for one in completions]
"""


def prepare(root: Path, tokenizer) -> None:
    """A folder with a tiny model and rows for every method: five to train on, one held out.

    A pass over the prompts ends within a step; four ranks have fewer of them than two steps take.
    """
    from treetune.models import heads, hf, llama

    sizes = dict(vocab_size=257, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=128)
    hf.save(root / "model", hf.random("llama", llama.Config(**sizes, tied=True, init_std=0.2), seed=3), tokenizer=tokenizer)
    # Rows, and halves of rows, of whole blocks of codes, as layers that are split need them.
    wide = llama.Config(**sizes | {"hidden_size": 64, "mlp_size": 128, "head_dim": 32}, tied=True, init_std=0.2)
    hf.save(root / "wide", hf.random("llama", wide, seed=3), tokenizer=tokenizer)
    judge = hf.random("llama", llama.Config(**sizes | {"hidden_size": 24, "num_layers": 3}, tied=True, init_std=0.2), seed=4)
    heads.save(root / "judge", judge, heads.init(judge.cfg, 1, bias=False, seed=5), tokenizer=tokenizer)
    (root / "rewards.py").write_text(REWARDS)
    long = ["red blue green "[: 1 + 5 * i % 14] * (1 + i % 3) for i in range(10)]
    every = [{"prompt": f"Row {i}: ", "chosen": one, "rejected": one[::-1] + "?" * (i % 2)} for i, one in enumerate(long)]
    pairs = every[:6]
    judged = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)} for i, row in enumerate(pairs)
    ]
    sets = {
        "text": [{"text": f"Row {i}: {one}, which is more"} for i, one in enumerate(long[:6])], "pairs": pairs, "judged": judged,
        "prompts": [{"prompt": row["prompt"] + row["chosen"][:9]} for row in every[:5]],
        "answers": [{"input": row["prompt"] + row["chosen"][:5], "output": row["chosen"]} for row in every[:5]],
    }  # fmt: skip
    for name, rows in sets.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(method: str, trains: str, output: Path, accumulation: int) -> list[str]:
    base = {
        "--model": "model", "--micro-batch-size": 1, "--gradient-accumulation-steps": accumulation, "--max-steps": 3, "--device": "cpu",
        "--val-set-size": 1, "--learning-rate": 0.01 if trains != "full" else 0.002, "--adam-epsilon": 1e-3, "--output-dir": output,
        "--sample-prompt": "", "--log-level": "warning", "--saves-per-epoch": 0,
    }  # fmt: skip
    own = [*OWN[method], *TRAINS[trains]]
    for flag in [part for part in own if str(part).startswith("--")]:
        base.pop(flag, None)
    if method == "reward":
        base.pop("--sample-prompt")
    flat = [f"{flag}=" if value == "" else part for flag, value in base.items() for part in ([flag] if value == "" else [flag, value])]
    return [method.split("-")[0], *map(str, [*flat, *own])]


def run(case: str, results: Path, accumulation: int) -> None:
    """A run of a case, in the folder of the rows."""
    from treetune.cli import main

    method, trains, *placed = case.split()
    flags = [] if not placed else ["--sharding", placed[0], "--shard", placed[1]]
    code = main.main([*arguments(method, trains, folder(results, case), accumulation), *flags])
    assert code == 0, f"{case}: exit code {code}"


def folder(results: Path, case: str) -> Path:
    """The run folder of a case."""
    return results / case.replace(" ", "_").replace(",", "_")


def rank(root: Path, results: Path, cases: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(root)
    for case in cases:
        run(case, results, 1)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    rank(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
