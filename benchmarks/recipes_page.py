"""Writes docs/recipes.md: a row for each of examples/*.yaml, with the figures of results/*/recipes/NAME.json.

python benchmarks/recipes_page.py
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
RESULTS = ROOT / "benchmarks" / "results"
FEW = 4  # steps up to which a reward of sampled completions tells nothing
HEAD = """<!-- Made by `python benchmarks/recipes_page.py` of benchmarks/results/*/recipes/*.json; a test compares. -->

# Recipes

Each file runs as it is, on SmolLM2-135M-Instruct (270 MB, fetched at the first run) and the rows of `examples/data`.
Copy one, put in your own model and rows, and see what it would take with `treetune plan run.yaml`. Other models:
[how much memory a run takes](memory_table.md).

| file | goal | rows | to change for your own |
|---|---|---|---|
"""
MEASURED = """
## What they did when they were run

Each was run by `benchmarks/recipes.py` on one thread of {cpu}, beside other work, which lengthens seconds of the clock more
than those of the CPU (load averages are in the JSON). **The steps are few**, by flags that the runs had besides the file: the figures
show that a recipe runs, what it costs and which way it begins to move, not where it ends. Held-out rows are few as well. A loss is that
of held-out rows, a token or a pair; a reward is that of sampled completions, at the first steps and at the last. Before its first
step a policy is its own reference, where there is one: margins are 0 then, and no pair is won.

| command | steps | tokens | CPU (s) | clock (s) | a step (s) | peak memory (GiB) | before -> after |
|---|---|---|---|---|---|---|---|
"""
FLAGS = """
Flags besides the file, and the commit that was run:

| file | flags | commit |
|---|---|---|
"""


class Text(NamedTuple):
    """What a recipe is for, the rows that it reads, and what to change."""

    goal: str
    rows: str
    change: str


PAIRS = "160 pairs of solutions (GSM8K)"
SOLUTIONS = "400 solved problems (GSM8K)"
PASSAGES = "128 passages of Shakespeare"
PROGRAMS = "164 functions with solutions (HumanEval)"
SERVER = "as without a server; `max_model_len` of `serve.yaml` holds prompt and completion"
TEXTS = {
    "pretrain_text": Text("go on with pretraining, on plain text", "5 passages", "`data`, `sequence_len`, `model`"),
    "sft_alpaca": Text("instructions, LoRA+ on two matrices", "5 instructions", "`format` names the columns"),
    "sft_lora": Text("answer as rows do, LoRA", SOLUTIONS, "`data`; `sequence_len` from `treetune preprocess`"),
    "sft_full": Text("the same, all weights", SOLUTIONS, "a learning rate a tenth of that for LoRA"),
    "dpo_lora": Text("prefer one answer to another", PAIRS, "`prompt`, `chosen`, `rejected`; first an SFT of the base"),
    "dpo_mixture": Text("three losses summed (MPO)", PAIRS, "`loss_weights`"),
    "orpo_lora": Text("SFT and preferences at once, no reference", PAIRS, "`orpo_alpha`"),
    "simpo_lora": Text("preferences without a reference", PAIRS, "`rl_beta`, `simpo_gamma`"),
    "kto_lora": Text("good and bad answers that are no pairs", "240 judged solutions", "the two weights, as good and bad rows are many"),
    "reward_lora": Text("a reward model of answers", PAIRS, "`data`; then `treetune score`"),
    "prm_lora": Text("a reward model of steps", "160 solutions judged by line", "`completions` and `labels` of rows"),
    "grpo": Text("reinforcement by functions that score answers", SOLUTIONS, "`reward_funcs`: try them with `treetune rollout`"),
    "dapo": Text("the same as DAPO has it", SOLUTIONS, "the length penalty `max`, `cache`"),
    "guess": Text("a game of several turns", "10 games", "`rollout_func`, your environment"),
    "grpo_vllm": Text("GRPO, sampled by a server, a generation ahead", SOLUTIONS, SERVER),
    "ebft_strided": Text("match features of raw text", PASSAGES, "`stride`, `generate_max_len`"),
    "ebft_strided_full": Text("the same, all weights", PASSAGES, "a learning rate a tenth of that for LoRA"),
    "ebft_strided_structured": Text("the same within answers to prompts", PROGRAMS, "`format`, `min_completion_prefix`"),
    "ebft_structured": Text("whole answers that match true ones in features", PROGRAMS, "`format`, `max_completion_length`"),
    "ebft_structured_vllm": Text("the same, sampled by a server", PROGRAMS, SERVER),
    "ebft_structured_async": Text("the same, a generation ahead", PROGRAMS, SERVER),
    "serve": Text("the vLLM server of the files that sample with one", "none", "`model`, `max_lora_rank`"),
}

NOTES = """
What is no better, and why:

- `prm_lora.yaml`: solutions of one question are held out together. Of the steps of the 12 questions that are held out 65 % are good, of
  those of the other 37 questions 37 %. The loss of trained steps falls from 1.5 to about 0.5 in three epochs, but what carries over to
  other questions is little more than that share: 120 solutions do not teach a model of 135 M weights to judge arithmetic.
- `ebft_*.yaml`: the learning rate still warms up at these steps.
"""


def measured() -> dict[str, dict[str, Any]]:
    """{name: result} of the recipes that were run."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/recipes/*.json"))}
    return {name: found[name] for name in TEXTS if name in found}


def page() -> str:
    """The page."""
    results = measured()
    texts = [f"| `examples/{name}.yaml` | {text.goal} | {text.rows} | {text.change} |" for name, text in TEXTS.items()]
    cpu = ", ".join(sorted({one["machine"]["cpu"] for one in results.values()}))
    parts = [HEAD + "\n".join(texts) + "\n", MEASURED.format(cpu=cpu) + "\n".join(map(_figures, results.values())) + "\n"]
    if lacking := [f"`{name}.yaml`" for name in TEXTS if name not in results and name != "serve"]:
        parts.append(f"\nNot measured yet: {', '.join(lacking)}.\n")
    rows = [f"| `{name}.yaml` | `{one['flags']}` | {one['commit'][:8]}{_edited(one)} |" for name, one in results.items()]
    return "".join([*parts, NOTES, FLAGS + "\n".join(rows) + "\n"])


def _edited(one: dict[str, Any]) -> str:
    return ", with changes" if one["changed"] else ""


def _figures(one: dict[str, Any]) -> str:
    """The row of a run."""
    command = f"`treetune {one['command'].split()[1]} --config examples/{one['recipe']}.yaml`"
    server = " (without its server)" if one["server"] else ""
    memory = f"{one['peak_gib']:.1f}{server}"
    times = f"{one['cpu_s']:.0f}{server} | {one['wall_s']:.0f} | {one['step_s']:.1f}"
    return f"| {command} | {one['steps']} | {one['tokens']:.0f} | {times} | {memory} | {outcome(one)} |"


def outcome(one: dict[str, Any]) -> str:
    """What a run is judged by, before and after, and whether that is better."""
    parts = []
    for name, ends in one["judged"].items():
        # A policy that is its own reference wins no pair, as margins are 0: half of them are won by chance.
        chance = name == "eval/rewards/accuracies" and ends["before"] == 0
        gained = ends["after"] - (0.5 if chance else ends["before"])
        if not ends["more_is_better"]:
            gained = -gained
        values = f"{name} {ends['before']:.3f} -> {ends['after']:.3f}"
        if name.startswith("eval/"):
            parts.append(values if gained > 0 else f"{values} (no better)")
        else:
            parts.append(f"{values}{' (too few steps to tell)' if one['steps'] <= FEW else '' if gained > 0 else ' (no better)'}")
    return "; ".join(parts) or "too few steps to tell"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
