"""One supervised LoRA step: treetune against TRL + PEFT on the same rows, interleaved, each run in its own process.

SmolLM2-135M-Instruct, LoRA r 16 alpha 32 on all linear layers, GSM8K chat rows in file order, max length 512, 8 rows a step
in 2 micro-batches. Both sides train the same token ids and the same supervised tokens. TRL runs without gradient
checkpointing, its faster setting. The first step warms up; the rest are timed.

    python benchmarks/step_sft.py --rows path/to/gsm8k_train.jsonl        (needs the extra `bench`)
    python benchmarks/step_sft.py --bridged        the native family against transformers' own modules, on the same weights
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch

ROWS, MICRO, ACCUM, MAX_LENGTH, RANK, ALPHA, LR = 8, 4, 2, 512, 16, 32, 2e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read(path: str, count: int) -> list[dict]:
    """Rows as (user, assistant) message pairs, in file order."""
    rows = []
    for line in Path(path).read_text().splitlines()[:count]:
        row = json.loads(line)
        pair = row["messages"] if "messages" in row else [{"content": row["question"]}, {"content": row["answer"]}]
        rows.append({"user": pair[0]["content"], "assistant": pair[1]["content"]})
    return rows


def model_folder() -> str:
    from treetune.models import fetch

    return str(fetch.resolve("smollm2-135m-instruct"))


def ours(args: argparse.Namespace) -> dict:
    """The step of treetune, as its command line builds it."""
    from treetune.cli.options import optim
    from treetune.cli.options.optim import OptimOptions
    from treetune.core import step
    from treetune.core.data import pack, spans
    from treetune.core.run import cadence
    from treetune.core.state import TrainState
    from treetune.losses import sft_objective
    from treetune.models import adapter, batches, hf, loading, policy

    device = torch.device("cpu")
    tokenizer = hf.tokenizer(args.model)
    docs = [doc_of(row, i, tokenizer, spans.Doc) for i, row in enumerate(read(args.rows, ROWS * args.steps))]
    model, _ = loading.load_model(args.model, dtype=args.dtype, device=device)
    start = policy.adapt(model, policy.AdapterSpec(rank=RANK, alpha=ALPHA), base=adapter.Base("base", ""), seed=0)
    objective = sft_objective.named(policy.logprob(start))
    optimizer = optim.build(OptimOptions(learning_rate=LR))
    run = step.make_step(objective, optimizer, schedule=cadence.schedule(cadence.Rate(LR, args.steps, warmup_steps=0)))
    state = TrainState(start.params, start.frozen, optimizer.init(start.params), {}, torch.tensor(0))
    collate, times, losses, counts = batches.batcher(model.cfg, device, (pack.collate,)), [], [], []
    for i in range(args.steps):
        start = time.perf_counter()
        groups = [range(j, j + MICRO) for j in range(i * ROWS, (i + 1) * ROWS, MICRO)]
        state, metrics = run(state, [collate([docs[k] for k in group]) for group in groups])
        losses.append(metrics["loss"].item())
        times.append(time.perf_counter() - start)
        counts.append(int(metrics["supervised_tokens"]))
    return summary(times, counts, losses)


def bridged(args: argparse.Namespace) -> dict:
    """The step of `ours` through the modules of transformers, as models without a native family are computed."""
    from treetune.models import MODELS, hf

    family, _ = hf.read_config(Path(args.model) / "config.json")
    kind = json.loads((Path(args.model) / "config.json").read_text())["model_type"]
    del MODELS[family]
    assert hf.read_config(Path(args.model) / "config.json")[0] == kind and kind not in list(MODELS), f"{kind} is still native"
    return ours(args)


def ids_of(row: dict, tokenizer) -> tuple[list[int], int]:
    """Token ids of a row, and how many of them are its prompt."""
    turns = [{"role": "user", "content": row["user"]}, {"role": "assistant", "content": row["assistant"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    full = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    return full[:MAX_LENGTH], len(prompt)


def doc_of(row: dict, number: int, tokenizer, kind):
    """A row as a document whose completion is supervised, as TRL does."""
    import numpy as np

    ids, prompt = ids_of(row, tokenizer)
    weight = np.zeros(len(ids), np.float32)
    weight[prompt:] = 1.0
    return kind(np.array(ids), weight, number)


def theirs(args: argparse.Namespace) -> dict:
    """The step of TRL's SFTTrainer with a PEFT adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.start)

        def on_log(self, _, __, ___, logs=None, **____):
            losses.extend([logs["loss"]] if "loss" in (logs or {}) else [])

    rows = read(args.rows, ROWS * args.steps)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": r["user"]}], "completion": [{"role": "assistant", "content": r["assistant"]}]}
            for r in rows
        ]
    )
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=MAX_LENGTH, per_device_train_batch_size=MICRO, gradient_accumulation_steps=ACCUM,
        max_steps=args.steps, learning_rate=LR, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        gradient_checkpointing=False, bf16=args.dtype == "bfloat16", use_cpu=True, train_sampling_strategy="sequential",
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    peft = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, peft_config=peft, callbacks=[Clock()]).train()
    encoded = [ids_of(row, tokenizer) for row in rows]
    counts = [sum(len(ids) - n for ids, n in encoded[i : i + ROWS]) for i in range(0, len(encoded), ROWS)]
    return summary(times, counts, losses)


def summary(times: list[float], counts: list[int], losses: list[float]) -> dict:
    rates = [count / seconds for count, seconds in zip(counts[1:], times[1:], strict=True)]
    return {
        "supervised_tokens_per_s": statistics.median(rates), "step_s": statistics.median(times[1:]), "peak_gib": harness.peak_gib(),
        "first_loss": losses[0], "last_loss": losses[-1], "supervised_tokens": sum(counts),
    }  # fmt: skip


def first_step(args: argparse.Namespace) -> dict:
    """Seconds from starting the command to the end of its first step; each side as a user would start it."""
    start = time.perf_counter()
    if args.side == "first-ours":
        rows = str(Path(__file__).parent.parent / "examples" / "data" / "gsm8k_train_sample.jsonl")
        command = [
            *(sys.executable, "-m", "treetune.cli.main", "sft", "--model", args.model, "--data", rows, "--max-rows", "80"),
            *("--no-shuffle", "--no-sample-packing", "--micro-batch-size", str(MICRO), "--gradient-accumulation-steps", str(ACCUM)),
            *("--max-steps", "1", "--val-set-size", "0", "--dtype", args.dtype, "--output-dir", tempfile.mkdtemp()),
        ]
        mark = "step    1/1"
    else:
        command = [
            sys.executable,
            __file__,
            "--side",
            "trl",
            "--steps",
            "1",
            "--dtype",
            args.dtype,
            "--rows",
            args.rows,
            "--model",
            args.model,
        ]
        mark = "'loss'"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    seen = next((time.perf_counter() - start for line in process.stdout if mark in line), None)
    process.stdout.read()
    if process.wait() and seen is None or seen is None:
        raise SystemExit(f"{args.side}: no first step seen")
    return {"first_step_s": seen}


def ratios(ours_: dict, theirs_: dict) -> dict:
    return {
        "speed": ours_["supervised_tokens_per_s"] / theirs_["supervised_tokens_per_s"],
        "memory": ours_["peak_gib"] / theirs_["peak_gib"],
        "first_loss_difference": ours_["first_loss"] - theirs_["first_loss"],
    }


def drive_bridged(args: argparse.Namespace) -> None:
    """Native and bridged steps in turn; medians and ratios to JSON."""
    common = ["--rows", args.rows, "--model", args.model, "--steps", str(args.steps)]
    options = {"rows": ROWS, "micro": MICRO, "steps": args.steps, "repeats": args.repeats}
    result: dict = {"benchmark": "step_sft_bridged", "machine": harness.machine(), "options": options}
    for dtype in args.dtypes:
        sides = [["--side", side, "--dtype", dtype, *common] for side in ("ours", "bridged")]
        runs = harness.interleave(__file__, sides, args.repeats)
        native, other = (harness.medians(side) for side in runs)
        result[dtype] = {
            "native": native, "bridged": other, "step_ratio": other["step_s"] / native["step_s"],
            "memory_ratio": other["peak_gib"] / native["peak_gib"],
            "loss_differences": [other[name] - native[name] for name in ("first_loss", "last_loss")],
            "runs": {"native": runs[0], "bridged": runs[1]},
        }  # fmt: skip
        print(dtype, json.dumps({name: value for name, value in result[dtype].items() if "ratio" in name or "loss" in name}), flush=True)
    print("saved", harness.save("step_sft_bridged", result))


def drive(args: argparse.Namespace) -> None:
    """All sides in turn, three times; medians and ratios to JSON."""
    common = ["--rows", args.rows, "--model", args.model, "--steps", str(args.steps)]
    result: dict = {"benchmark": "step_sft", "machine": harness.machine(), "options": {"rows": ROWS, "micro": MICRO, "steps": args.steps}}
    for dtype in args.dtypes:
        rate = [harness.gemm_rate(DTYPES[dtype])]
        sides = [["--side", side, "--dtype", dtype, *common] for side in ("ours", "trl")]
        runs = harness.interleave(__file__, sides, args.repeats)
        rate.append(harness.gemm_rate(DTYPES[dtype]))
        mine, peer = (harness.medians(side) for side in runs)
        result[dtype] = {
            "ours": mine, "trl": peer, "ratio": ratios(mine, peer), "gemm_gflop_per_s": rate, "runs": {"ours": runs[0], "trl": runs[1]}
        }  # fmt: skip
        print(dtype, json.dumps(result[dtype]["ratio"]), flush=True)
    sides = [["--side", side, "--dtype", "float32", *common] for side in ("first-ours", "first-trl")]
    runs = harness.interleave(__file__, sides, args.repeats)
    mine, peer = (harness.medians(side)["first_step_s"] for side in runs)
    result["command_to_first_step_s"] = {"ours": mine, "trl": peer, "ratio": mine / peer}
    print("saved", harness.save("step_sft", result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=str(Path(__file__).parent.parent / "examples" / "data" / "gsm8k_train_sample.jsonl"))
    parser.add_argument("--model", default=None)
    parser.add_argument("--side", default=None)
    parser.add_argument("--bridged", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.model = args.model or model_folder()
    sides = {"ours": ours, "bridged": bridged, "trl": theirs, "first-ours": first_step, "first-trl": first_step}
    if args.side is None:
        (drive_bridged if args.bridged else drive)(args)
        return
    with torch.random.fork_rng():
        print(json.dumps(sides[args.side](args)))


if __name__ == "__main__":
    main()
