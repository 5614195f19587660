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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
    from treetune.core.quant import Scheme
    from treetune.models import loading

    scheme = None if args.quant == "none" else Scheme(args.quant)
    model, _ = loading.load_model(args.model, dtype=args.dtype, device=torch.device("cpu"), scheme=scheme)
    return summary_of(list(map(stepper(args, model), range(args.steps))))


class Step(NamedTuple):
    """Seconds of the clock and of the processor, the loss, and supervised tokens of a step."""

    seconds: float
    cpu_seconds: float
    loss: float
    tokens: int


def stepper(args: argparse.Namespace, model: Any, pair_of: Callable[[str], tuple] | None = None) -> Callable[[int], Step]:
    """The training step of a model with a fresh adapter, by its number. pair_of: A and B to start with, by the path of the leaf."""
    from treetune.cli.options import optim
    from treetune.cli.options.optim import OptimOptions
    from treetune.core import lora, step
    from treetune.core.data import pack, spans
    from treetune.core.run import cadence
    from treetune.core.state import TrainState
    from treetune.losses import sft_objective
    from treetune.models import adapter, batches, hf, policy

    tokenizer = hf.tokenizer(args.model)
    docs = [doc_of(row, i, tokenizer, spans.Doc) for i, row in enumerate(read(args.rows, args.step_rows * args.steps))]
    start = policy.adapt(model, policy.AdapterSpec(rank=RANK, alpha=ALPHA), base=adapter.Base("base", ""), seed=0)
    for path, (low, up) in lora.pairs(start.params["lora"]).items() if pair_of else ():
        for leaf, value in zip((low, up), pair_of(path), strict=True):
            leaf.copy_(value)
    optimizer = optim.build(OptimOptions(learning_rate=LR))
    schedule = cadence.schedule(cadence.Rate(LR, args.steps, warmup_steps=0))
    run = step.make_step(sft_objective.named(policy.logprob(start)), optimizer, schedule=schedule)
    states = [TrainState(start.params, start.frozen, optimizer.init(start.params), {}, torch.tensor(0))]
    collate = batches.batcher(model.cfg, torch.device("cpu"), (pack.collate,))

    def one(number: int) -> Step:
        begin, cpu = time.perf_counter(), time.process_time()
        first, end = number * args.step_rows, (number + 1) * args.step_rows
        groups = [range(j, min(j + MICRO, end)) for j in range(first, end, MICRO)]
        states[0], metrics = run(states[0], [collate([docs[k] for k in group]) for group in groups])
        loss = metrics["loss"].item()
        return Step(time.perf_counter() - begin, time.process_time() - cpu, loss, int(metrics["supervised_tokens"]))

    return one


def summary_of(steps: list[Step]) -> dict:
    return summary([one.seconds for one in steps], [one.tokens for one in steps], [one.loss for one in steps])


def bridged_pair(args: argparse.Namespace) -> list[Callable[[int], Step]]:
    """The steps of a native family, and of the same weights and the same fresh adapter through the modules of transformers."""
    from treetune.core import lora
    from treetune.models import MODELS, bridge, hf, hf_keys, loading

    native, _ = loading.load_model(args.model, dtype=args.dtype, device=torch.device("cpu"))
    sizes = hf.abstract_of(native)
    fresh = lora.init(sizes, lora.match(sizes, "all-linear"), rank=RANK, seed=0)
    by_key = {hf_keys.hf_key(native.family, path): pair for path, pair in lora.pairs(fresh).items()}
    values = json.loads((Path(args.model) / "config.json").read_text())
    MODELS["bridged"] = bridge.family(values["model_type"])
    native_module = MODELS.pop(native.family)
    other = hf.load(args.model, dtype=DTYPES[args.dtype])
    MODELS[native.family] = native_module
    assert isinstance(other.cfg, bridge.Config), f"{native.family} is still native"
    steps = stepper(args, other._replace(family="bridged"), lambda path: by_key[hf_keys.hf_key("bridged", path)])
    return [stepper(args, native), steps]


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


def four_bits(args: argparse.Namespace):
    """How bitsandbytes quantises the model of the peer, as we do ours; None where neither does."""
    from transformers import BitsAndBytesConfig

    if args.quant == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=args.quant, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPES[args.dtype]
    )


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
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype], quantization_config=four_bits(args))
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
    """Native and bridged steps in turn in one process; medians and ratios to JSON."""
    options = {"rows": args.step_rows, "micro": min(MICRO, args.step_rows), "steps": args.steps}
    result: dict = {"benchmark": "step_sft_bridged", "machine": harness.machine(), "options": options}
    for dtype in args.dtypes:
        sides, runs = bridged_pair(argparse.Namespace(**vars(args) | {"dtype": dtype})), ([], [])
        for number in range(args.steps):
            for steps, one in zip(runs, sides, strict=True):
                steps.append(one(number))
                print(steps[-1], flush=True)
        native, other = runs
        result[dtype] = {
            "step_s": [statistics.median(one.seconds for one in steps[1:]) for steps in runs],
            "cpu_s": [statistics.median(one.cpu_seconds for one in steps[1:]) for steps in runs],
            "step_ratio": statistics.median(b.seconds / a.seconds for a, b in zip(native[1:], other[1:], strict=True)),
            "cpu_ratio": statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in zip(native[1:], other[1:], strict=True)),
            "loss_differences": [b.loss - a.loss for a, b in zip(native, other, strict=True)],
            "runs": {"native": native, "bridged": other},
        }
        print(dtype, json.dumps({name: value for name, value in result[dtype].items() if name != "runs"}), flush=True)
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


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default=str(Path(__file__).parent.parent / "examples" / "data" / "gsm8k_train_sample.jsonl"))
    parser.add_argument("--model", default=None)
    parser.add_argument("--side", default=None)
    parser.add_argument("--bridged", action="store_true")
    parser.add_argument("--step-rows", type=int, default=ROWS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quant", default="none", choices=("none", "nf4", "fp4"))
    return parser


def main() -> None:
    args = parser().parse_args()
    args.model = args.model or model_folder()
    sides = {"ours": ours, "trl": theirs, "first-ours": first_step, "first-trl": first_step}
    if args.side is None:
        (drive_bridged if args.bridged else drive)(args)
        return
    with torch.random.fork_rng():
        print(json.dumps(sides[args.side](args)))


if __name__ == "__main__":
    main()
