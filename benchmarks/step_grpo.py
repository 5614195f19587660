"""One GRPO step with LoRA: treetune with its local sampler against TRL with transformers generation, interleaved, each in its own process.

SmolLM2-135M-Instruct, LoRA r 16 alpha 32 on all linear layers, float32, 2 GSM8K prompts a step with 8 completions of exactly 64 tokens
each, temperature 1, no reference, loss dapo, the share of digits as the reward. The first step warms up; the rest are timed. TRL runs
without gradient checkpointing, its faster setting.

    python benchmarks/step_grpo.py        (needs the extra `bench`)
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import harness
import quiet
import step_sft

SAMPLE = Path(__file__).parent.parent / "examples" / "data" / "gsm8k_train_sample.jsonl"
PROMPTS, GROUP, NEW, RANK, ALPHA, LR = 2, 8, 64, 16, 32, 1e-5


def digits(completions, **_) -> list[float]:
    """Share of the characters of each completion that are digits."""
    texts = [item if isinstance(item, str) else item[0]["content"] for item in completions]
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]


def summary(times: list[tuple[float, float]], tokens: list[float], start: quiet.Mark) -> dict:
    """times: seconds of each step, and of its generation."""
    steps, parts = zip(*times[1:], strict=True)
    busy = quiet.busy_cores(start, quiet.mark())
    return {
        "step_s": statistics.median(steps), "generation_s": statistics.median(parts),
        "training_s": statistics.median(a - b for a, b in times[1:]), "tokens": statistics.median(tokens[1:]),
        "peak_gib": harness.peak_gib(), "others_busy_cores": busy,
    }  # fmt: skip


def ours(args: argparse.Namespace) -> dict:
    """The step of treetune, as its command line builds it."""

    from treetune.cli import assembly, fit
    from treetune.cli.methods.grpo import Grpo
    from treetune.cli.options.data import PromptData
    from treetune.cli.options.model import AdapterOptions, ModelOptions
    from treetune.cli.options.optim import RlOptim
    from treetune.cli.options.pipeline import PipelineOptions
    from treetune.cli.options.rollout import RewardFunctions, RolloutOptions
    from treetune.cli.options.run import RunOptions
    from treetune.models import tokenizer

    tokenizer.stop_ids = lambda *_, **__: []  # nothing ends a completion early, on either side
    config = Grpo(
        model=ModelOptions(model=args.model, dtype="float32"),
        data=PromptData(data=(str(SAMPLE),)),
        adapter=AdapterOptions(lora_r=RANK, lora_alpha=ALPHA),
        rollout=RolloutOptions(num_generations=GROUP, max_completion_length=NEW),
        rewards=RewardFunctions(reward_funcs=("digits",)),
        pipeline=PipelineOptions(log_completions=False, num_completions_to_print=0),
        optim=RlOptim(learning_rate=LR, max_steps=args.steps, warmup_steps=0, micro_batch_size=PROMPTS, gradient_accumulation_steps=1),
        run=RunOptions(output_dir=tempfile.mkdtemp()),
    )
    times, tokens = [], []
    with contextlib.ExitStack() as stack:
        run = fit.begin(config, (), frozenset(), stack)
        made = assembly.assemble(run, None, stack)
        state, source = made.state, made.supply.source
        for i in range(args.steps):
            if i == 1:
                start = quiet.mark()
            begun = time.perf_counter()
            micro_batches, found = source.next(state, i + 1)
            state, metrics = made.step(state, micro_batches)
            metrics["loss"].item()
            times.append((time.perf_counter() - begun, found["rollout/seconds"]))
            tokens.append(found["completions/mean_length"] * PROMPTS * GROUP)
    return summary(times, tokens, start)


def theirs(args: argparse.Namespace) -> dict:
    """The step of TRL's GRPOTrainer with a PEFT adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    times, tokens, marks, generated = [], [], [], []

    class Timed(GRPOTrainer):
        def _generate(self, *given, **named):
            begun = time.perf_counter()
            out = super()._generate(*given, **named)
            generated.append(time.perf_counter() - begun)
            return out

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if len(times) == 1:
                marks.append(quiet.mark())
            marks.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append((time.perf_counter() - marks[-1], generated[-1]))

        def on_log(self, _, __, ___, logs=None, **____):
            if "completions/mean_length" in (logs or {}):
                tokens.append(logs["completions/mean_length"] * PROMPTS * GROUP)

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=PROMPTS * GROUP, gradient_accumulation_steps=1, num_generations=GROUP,
        max_completion_length=NEW, generation_kwargs={"min_new_tokens": NEW}, max_steps=args.steps, learning_rate=LR, logging_steps=1,
        lr_scheduler_type="constant", temperature=1.0, beta=0.0, loss_type="dapo", save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0, shuffle_dataset=False,
    )  # fmt: skip
    rows = [{"prompt": json.loads(line)["messages"][:1]} for line in SAMPLE.read_text().splitlines()[: PROMPTS * args.steps]]
    peft = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=step_sft.DTYPES["float32"])
    trainer = Timed(
        model, reward_funcs=digits, args=config, train_dataset=Dataset.from_list(rows), peft_config=peft,
        processing_class=AutoTokenizer.from_pretrained(args.model), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    start = next(item for item in marks if isinstance(item, quiet.Mark))
    return summary(times, tokens, start)


def drive(args: argparse.Namespace) -> None:
    """Both sides in turn; medians and ratios to JSON."""
    common = ["--model", args.model, "--steps", str(args.steps)]
    rounds = [[quiet.undisturbed(__file__, ["--side", side, *common]) for side in ("ours", "trl")] for _ in range(args.repeats)]
    mine, peer = (list(side) for side in zip(*rounds, strict=True))
    a, b = harness.medians(mine), harness.medians(peer)
    ratio = {name: b[f"{name}_s"] / a[f"{name}_s"] for name in ("step", "generation", "training")}
    ratio["memory"] = a["peak_gib"] / b["peak_gib"]
    options = {"prompts": PROMPTS, "completions": GROUP, "tokens": NEW, "steps": args.steps}
    found = {"ours": a, "trl": b, "ratio": ratio, "runs": {"ours": mine, "trl": peer}}
    result = {"benchmark": "step_grpo", "machine": harness.machine(), "options": options, "float32": found}
    print(json.dumps(ratio), "saved", harness.save("step_grpo", result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--side", default=None, choices=["ours", "trl"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.model = args.model or step_sft.model_folder()
    if args.side is None:
        drive(args)
        return
    print(json.dumps({"ours": ours, "trl": theirs}[args.side](args)))


if __name__ == "__main__":
    main()
