"""One DPO step with LoRA: treetune against TRL + PEFT on the same pairs, interleaved, each run in its own process.

SmolLM2-135M-Instruct, LoRA r 16 alpha 32 on all linear layers, beta 0.1, GSM8K pairs as plain texts in file order, max length 512,
8 pairs a step in 2 micro-batches. Both sides score the same tokens against the base model, the adapter switched off, at every step.
TRL runs without gradient checkpointing, its faster setting. The first step warms up; the rest are timed.

    python benchmarks/step_dpo.py        (needs the extra `bench`)
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import harness
import quiet
import step_sft
import torch

PAIRS, MICRO, ACCUM, MAX_LENGTH, RANK, ALPHA, LR, BETA = 8, 4, 2, 512, 16, 32, 5e-5, 0.1
SAMPLE = Path(__file__).parent.parent / "examples" / "data" / "gsm8k_preference_sample.jsonl"


def read(path: str, count: int) -> list[dict]:
    """Rows of prompt, chosen and rejected, in file order."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()[:count]]


def ours(args: argparse.Namespace) -> dict:
    """The step of treetune, as its command line builds it."""
    from treetune.cli import assembly
    from treetune.cli.methods import dpo
    from treetune.cli.methods.dpo import Dpo, DpoLoss
    from treetune.cli.methods.method import Setting
    from treetune.cli.options import optim
    from treetune.cli.options.model import AdapterOptions, ModelOptions
    from treetune.cli.options.optim import PreferenceOptim
    from treetune.core import step
    from treetune.core.data import kinds, sources
    from treetune.core.run import cadence, ranks
    from treetune.core.state import TrainState
    from treetune.models import adapter, batches, hf, loading, policy

    device = torch.device("cpu")
    config = Dpo(
        model=ModelOptions(model=args.model, dtype=args.dtype),
        adapter=AdapterOptions(lora_r=RANK, lora_alpha=ALPHA),
        loss=DpoLoss(rl_beta=BETA),
        optim=PreferenceOptim(learning_rate=LR, lr_scheduler="constant", warmup_steps=0),
    )
    rows = sources.from_list(read(args.rows, PAIRS * args.steps))
    docs, _ = kinds.KINDS["pairs"].encode(rows, hf.tokenizer(args.model), format="passthrough", sequence_len=MAX_LENGTH, overlong="error")
    model, _ = loading.load_model(args.model, dtype=args.dtype, device=device)
    start = policy.adapt(model, assembly.adapter_spec(config.adapter), base=adapter.Base("base", ""), seed=0)
    parts = dpo.parts(config, start, Setting(device, ranks.ALONE, None, (), print, print))
    optimizer = optim.build(config.optim)
    run = step.make_step(
        parts.objective, optimizer, schedule=cadence.schedule(cadence.Rate(LR, args.steps, warmup_steps=0)), prepare=parts.prepare
    )
    state = TrainState(parts.policy.params, parts.policy.frozen, optimizer.init(parts.policy.params), parts.extra, torch.tensor(0))
    collate, marks, losses, scored = batches.batcher(model.cfg, device, parts.collates), [], [], 0
    for i in range(args.steps):
        marks.append(quiet.mark())
        groups = [range(j, j + MICRO) for j in range(i * PAIRS, (i + 1) * PAIRS, MICRO)]
        state, metrics = run(state, [collate([docs[k] for k in group]) for group in groups])
        losses.append(metrics["loss"].item())
        marks.append(quiet.mark())
        scored += int(metrics["supervised_tokens"])
    return summary(marks, losses, scored, sum(len(doc.tokens) for doc in docs))


def theirs(args: argparse.Namespace) -> dict:
    """The step of TRL's DPOTrainer with a PEFT adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    marks, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(quiet.mark())

        def on_step_end(self, *_, **__):
            marks.append(quiet.mark())

        def on_log(self, _, __, ___, logs=None, **____):
            losses.extend([logs["loss"]] if "loss" in (logs or {}) else [])

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), beta=BETA, max_length=MAX_LENGTH, per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=ACCUM, max_steps=args.steps, learning_rate=LR, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to="none", gradient_checkpointing=False, precompute_ref_log_probs=False,
        bf16=args.dtype == "bfloat16", use_cpu=True, train_sampling_strategy="sequential", disable_tqdm=True, seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=step_sft.DTYPES[args.dtype])
    peft = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_list(read(args.rows, PAIRS * args.steps))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft, callbacks=[Clock()])
    trainer.train()
    sides = [[(len(row["prompt_ids"]), len(row[f"{side}_ids"])) for side in ("chosen", "rejected")] for row in trainer.train_dataset]
    longest = [max(sum(lengths) for pair in sides[i : i + MICRO] for lengths in pair) for i in range(0, len(sides), MICRO)]
    return summary(marks, losses, sum(n for pair in sides for _, n in pair), 2 * MICRO * sum(longest))


def summary(marks: list[quiet.Mark], losses: list[float], scored: int, computed: int) -> dict:
    """The numbers of a run from the beginning and end of its steps; `computed`: tokens that its forward passes go over, with padding."""
    times = [end.time - start.time for start, end in zip(marks[2::2], marks[3::2], strict=True)]  # without the first step
    return {
        "pair_s": statistics.fmean(times) / PAIRS, "step_s": statistics.median(times), "peak_gib": harness.peak_gib(),
        "first_loss": losses[0], "last_loss": losses[-1], "scored_tokens": scored, "computed_tokens": computed,
        "others_busy_cores": quiet.busy_cores(marks[2], marks[-1]),
    }  # fmt: skip


def ratios(ours_: dict, theirs_: dict) -> dict:
    return {
        "speed": theirs_["pair_s"] / ours_["pair_s"],
        "memory": ours_["peak_gib"] / theirs_["peak_gib"],
        "first_loss_difference": ours_["first_loss"] - theirs_["first_loss"],
        "scored_tokens_difference": ours_["scored_tokens"] - theirs_["scored_tokens"],
    }


def drive(args: argparse.Namespace) -> None:
    """Both sides in turn, three times; medians and ratios to JSON, after each dtype."""
    common = ["--rows", args.rows, "--model", args.model, "--steps", str(args.steps)]
    options = {"pairs": PAIRS, "micro": MICRO, "steps": args.steps}
    result: dict = {"benchmark": "step_dpo", "machine": harness.machine(), "options": options}
    for dtype in args.dtypes:
        rate = [harness.gemm_rate(step_sft.DTYPES[dtype])]
        sides = [["--side", side, "--dtype", dtype, *common] for side in ("ours", "trl")]
        rounds = [[quiet.undisturbed(__file__, side) for side in sides] for _ in range(args.repeats)]
        runs = [list(side) for side in zip(*rounds, strict=True)]
        rate.append(harness.gemm_rate(step_sft.DTYPES[dtype]))
        mine, peer = (harness.medians(side) for side in runs)
        result[dtype] = {
            "ours": mine, "trl": peer, "ratio": ratios(mine, peer), "gemm_gflop_per_s": rate, "runs": {"ours": runs[0], "trl": runs[1]}
        }  # fmt: skip
        print(dtype, json.dumps(result[dtype]["ratio"]), "saved", harness.save("step_dpo", result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=str(SAMPLE))
    parser.add_argument("--model", default=None)
    parser.add_argument("--side", default=None, choices=["ours", "trl"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.model = args.model or step_sft.model_folder()
    if args.side is None:
        drive(args)
        return
    with torch.random.fork_rng():
        print(json.dumps({"ours": ours, "trl": theirs}[args.side](args)))


if __name__ == "__main__":
    main()
