"""Sampling: models.decode against transformers' generate, interleaved, each run in its own process.

SmolLM2-135M-Instruct with its float32 weights, GSM8K questions as chats, exactly 64 new tokens a completion at temperature 1, for batches
of 1, 16 and 64 completions: 8 of each prompt, so that 16 are 2 prompts and 64 are 8 (1 is one of one). transformers is given the prompts
repeated and padded on the left, as trainers do. The first call warms up; the median of the rest counts.

    python benchmarks/generate.py        (needs the extra `bench`)
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import harness
import quiet
import step_sft
import torch

SAMPLE = Path(__file__).parent.parent / "examples" / "data" / "gsm8k_train_sample.jsonl"
NEW, CALLS, GROUP = 64, 3, 8


def prompts(args: argparse.Namespace, tokenizer) -> tuple[list[list[int]], int]:
    """(ids of the prompts, completions of each)."""
    n = min(args.batch, GROUP)
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()[: args.batch // n]]
    asked = [row["messages"][:1] for row in rows]
    return [
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False) for conversation in asked
    ], n


def timed(call) -> dict:
    """Seconds of a call and tokens a second; `call(seed)` gives the number of tokens it sampled."""
    call(0)
    start, times, count = quiet.mark(), [], 0
    for seed in range(1, CALLS):
        begun = time.perf_counter()
        count = call(seed)
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times)
    busy = quiet.busy_cores(start, quiet.mark())
    return {"seconds": seconds, "tokens_per_s": count / seconds, "tokens": count, "peak_gib": harness.peak_gib(), "others_busy_cores": busy}


def ours(args: argparse.Namespace) -> dict:
    from treetune.models import decode, hf

    model = hf.load(args.model, dtype=step_sft.DTYPES[args.dtype])
    ids, n = prompts(args, hf.tokenizer(args.model))
    return timed(lambda seed: int(decode.sample(model, ids, n=n, max_new_tokens=NEW, temperature=1.0, seed=seed).lens.sum()))


def theirs(args: argparse.Namespace) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=step_sft.DTYPES[args.dtype])
    ids, n = prompts(args, tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer.pad({"input_ids": [prompt for prompt in ids for _ in range(n)]}, return_tensors="pt")

    def call(seed: int) -> int:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
        out = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, **how)
        return out[:, batch["input_ids"].shape[1] :].numel()

    with torch.no_grad():
        return timed(call)


def drive(args: argparse.Namespace) -> None:
    """Both sides in turn for every batch; medians and ratios to JSON."""
    result: dict = {
        "benchmark": "generate",
        "machine": harness.machine(),
        "options": {"new_tokens": NEW, "dtype": args.dtype, "repeats": args.repeats},
    }
    for batch in args.batches:
        sides = [["--side", side, "--batch", str(batch), "--dtype", args.dtype, "--model", args.model] for side in ("ours", "hf")]
        rounds = [[quiet.undisturbed(__file__, side) for side in sides] for _ in range(args.repeats)]
        mine, peer = (harness.medians(list(side)) for side in zip(*rounds, strict=True))
        result[str(batch)] = {"ours": mine, "transformers": peer, "speed": peer["seconds"] / mine["seconds"]}
        print(batch, json.dumps(result[str(batch)]["speed"]), "saved", harness.save("generate", result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--side", default=None, choices=["ours", "hf"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.model = args.model or step_sft.model_folder()
    if args.side is None:
        drive(args)
        return
    print(json.dumps({"ours": ours, "hf": theirs}[args.side](args)))


if __name__ == "__main__":
    main()
