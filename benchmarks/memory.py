"""One QLoRA step: treetune against TRL + PEFT + bitsandbytes on the same rows, interleaved, each run in its own process: memory and time.

SmolLM2-135M-Instruct with its linear layers in NF4 (double quantisation), LoRA r 16 alpha 32 on all of them, GSM8K chat rows, max length
512, 8 rows a step in 2 micro-batches. Peak memory is that of the process, code and libraries included. Loading alone is measured, too,
in bfloat16 and in NF4: what a process holds after it against before, and the bytes of the leaves.

    python benchmarks/memory.py --rows path/to/gsm8k_train.jsonl        (needs the extra `bench`)
"""

import argparse
import json
import statistics

import harness
import step_sft
import torch


def resident() -> int:
    """Bytes of this process in memory now, without pages of files."""
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def load(args: argparse.Namespace) -> dict:
    """What loading the model leaves in memory."""
    from treetune.core import quant, tree
    from treetune.models import hf, loading

    device, folder = torch.device("cpu"), args.model
    hf.load(folder, dtype=torch.bfloat16)  # imports, allocator and file cache are warm
    before = resident()
    scheme = None if args.quant == "none" else quant.Scheme(args.quant)
    model, _ = loading.load_model(folder, dtype="bfloat16", device=device, scheme=scheme)
    linear = [leaf for path, leaf in tree.items(model.params) if path.endswith("_proj")]
    return {
        "resident_bytes": resident() - before,
        "leaf_bytes": tree.bytes(model.params),
        "linear_bytes": sum(leaf.nbytes for leaf in linear),
    }


def drive(args: argparse.Namespace) -> None:
    """All sides in turn; medians and ratios to JSON."""
    common = ["--rows", args.rows, "--model", args.model, "--steps", str(args.steps)]
    result: dict = {"benchmark": "memory", "machine": harness.machine(), "options": {"quant": "nf4", "steps": args.steps}}
    for dtype in args.dtypes:
        sides = [["--side", side, "--dtype", dtype, "--quant", "nf4", *common] for side in ("ours", "trl")]
        runs = harness.interleave(__file__, sides, args.repeats)
        mine, peer = (harness.medians(side) for side in runs)
        ratio = {name: mine[name] / peer[name] for name in ("peak_gib", "step_s")}
        ratio["first_loss_difference"] = mine["first_loss"] - peer["first_loss"]
        result[dtype] = {"ours": mine, "trl": peer, "ratio": ratio, "runs": {"ours": runs[0], "trl": runs[1]}}
        print(dtype, json.dumps(ratio), flush=True)
    runs = harness.interleave(__file__, [["--side", "load", "--quant", kind, *common] for kind in ("none", "nf4")], args.repeats)
    plain, small = ({name: statistics.median(run[name] for run in side) for name in side[0]} for side in runs)
    result["loading"] = {"bfloat16": plain, "nf4": small, "ratio": {name: plain[name] / small[name] for name in plain}}
    print("saved", harness.save("memory", result))


def main() -> None:
    parser = step_sft.parser()
    args = parser.parse_args()
    args.model = args.model or step_sft.model_folder()
    if args.side is None:
        drive(args)
        return
    print(json.dumps({"ours": step_sft.ours, "trl": step_sft.theirs, "load": load}[args.side](args)))


if __name__ == "__main__":
    main()
