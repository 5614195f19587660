"""Writes RESULTS.md from the JSON files under results/: every number in it is one that a benchmark measured.

python benchmarks/tables.py
"""

import json
from pathlib import Path

import harness

HEAD = """# Results

Written by `python benchmarks/tables.py` from `results/*/*.json`: medians of interleaved runs, each in a process of its own.
"""


def _described(machine: dict) -> str:
    """Processor, threads and versions, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return f"{machine['cpu']}, {machine['threads']} threads; {versions}."


def step_sft(results: dict) -> str:
    """One supervised step against TRL."""
    machine, options = results["machine"], results["options"]
    lines = [
        f"## One supervised LoRA step ({machine['device']})\n",
        _described(machine),
        "SmolLM2-135M-Instruct, LoRA r 16 on all linear layers, GSM8K chat rows in file order, "
        f"{options['rows']} rows a step in micro-batches of {options['micro']}, {options['steps'] - 1} timed steps a run, 3 runs a side.\n",
        "| dtype | side | supervised tokens/s | step (s) | peak memory (GiB) | first loss |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        if dtype in results:
            lines += [_row(dtype, side, results[dtype][key]) for side, key in (("treetune", "ours"), ("TRL + PEFT", "trl"))]
    for dtype in ("float32", "bfloat16"):
        if dtype in results:
            ratio, rates = results[dtype]["ratio"], results[dtype]["gemm_gflop_per_s"]
            products = " and ".join(f"{rate:.0f}" for rate in rates)
            lines.append(
                f"\n{dtype}: {ratio['speed']:.2f} x the speed at {ratio['memory']:.2f} x the memory (matrix product: {products} GFLOP/s)."
            )
    first = results["command_to_first_step_s"]
    lines.append(f"\nFrom the command to the end of its first step: {first['ours']:.1f} s against {first['trl']:.1f} s.")
    return "\n".join(lines) + "\n"


def step_sft_bridged(results: dict) -> str:
    """One supervised step of a native family against the same model through transformers' modules."""
    machine, options = results["machine"], results["options"]
    lines = [
        f"## One supervised LoRA step, native and bridged ({machine['device']})\n",
        _described(machine),
        "SmolLM2-135M-Instruct, LoRA r 16 on all linear layers, the same GSM8K chat rows and the same fresh adapter, by the native family "
        f"and through the modules of transformers in turn in one process; {options['rows']} rows a step in micro-batches of "
        f"{options['micro']}, {options['steps'] - 1} timed steps a side.\n",
        "| dtype | side | step (s) | processor time of a step (s) |",
        "|---|---|---|---|",
    ]
    dtypes = [dtype for dtype in ("float32", "bfloat16") if dtype in results]
    for dtype in dtypes:
        for side, clock, cpu in zip(("native", "bridged"), results[dtype]["step_s"], results[dtype]["cpu_s"], strict=True):
            lines.append(f"| {dtype} | {side} | {clock:.2f} | {cpu:.2f} |")
    for dtype in dtypes:
        run, worst = results[dtype], max(map(abs, results[dtype]["loss_differences"]))
        lines.append(
            f"\n{dtype}: the median of bridged over native steps is {run['step_ratio']:.2f} by the clock and {run['cpu_ratio']:.2f} by "
            f"processor time; their losses differ by at most {worst:.1e}."
        )
    return "\n".join(lines) + "\n"


def memory(results: dict) -> str:
    """One QLoRA step against TRL + PEFT + bitsandbytes, and what a loaded model holds."""
    machine, loading = results["machine"], results["loading"]
    lines = [
        f"## One QLoRA step ({machine['device']})\n",
        _described(machine),
        "SmolLM2-135M-Instruct, linear layers in NF4 with double quantisation, LoRA r 16 on all of them, GSM8K chat rows in file order, "
        f"8 rows a step in micro-batches of 4, {results['options']['steps'] - 1} timed steps a run, "
        f"{len(results['float32']['runs']['ours'])} runs a side. Memory is the peak of the process, libraries included.\n",
        "| dtype | side | supervised tokens/s | step (s) | peak memory (GiB) | first loss |",
        "|---|---|---|---|---|---|",
    ]
    dtypes = [dtype for dtype in ("float32", "bfloat16") if dtype in results]
    for dtype in dtypes:
        lines += [_row(dtype, side, results[dtype][key]) for side, key in (("treetune", "ours"), ("TRL + PEFT + bitsandbytes", "trl"))]
    for dtype in dtypes:
        ratio = results[dtype]["ratio"]
        lines.append(f"\n{dtype}: {ratio['step_s']:.2f} x the time and {ratio['peak_gib']:.2f} x the memory.")
    wide, small = (loading[name] for name in ("bfloat16", "nf4"))
    sizes = [f"{wide[name] / 2**20:.0f} MiB in bfloat16, {small[name] / 2**20:.0f} in NF4" for name in ("leaf_bytes", "linear_bytes")]
    lines.append(f"\nLoaded, all leaves take {sizes[0]}; the linear layers alone {sizes[1]}.")
    return "\n".join(lines) + "\n"


def loading(results: dict) -> str:
    """Resident memory of loading and of a step, quantised against bfloat16."""
    machine, options, sides = results["machine"], results["options"], results["medians"]
    first = sides["none"]
    lines = [
        f"## Loading {first['leaf_bytes'] / 2e9:.2f} B parameters ({machine['device']})\n",
        _described(machine),
        "Random weights of the shape of Llama 3 8B, scaled down, from files in bfloat16; then a step of LoRA "
        f"r {options['rank']} on all linear layers over {options['tokens']} tokens, with full gradient checkpointing. MiB over what the "
        f"process had before, {len(results['runs']['none'])} run(s) each: own memory at the peak, with pages of files in brackets.",
        f"A step has {first['adapter_bytes'] / 2**20:.0f} MiB of adapter, gradient and moments, whatever the weights; the last ratio is "
        "without them.\n",
        "| weights | leaves | loading | loaded | step | bfloat16 over it: leaves, loading, loaded with a step |",
        "|---|---|---|---|---|---|",
    ]
    for kind, side in sides.items():
        peaks = [
            f"{side[f'{what}_peak_bytes'] / 2**20:.0f} ({side[f'{what}_resident_peak_bytes'] / 2**20:.0f})" for what in ("load", "step")
        ]
        ratios = [f"{first[name] / side[name]:.2f}" for name in ("leaf_bytes", "load_peak_bytes")]
        ratios.append(f"{_held(first) / _held(side):.2f}")
        sizes = [f"{side[name] / 2**20:.0f}" for name in ("leaf_bytes", "load_left_bytes")]
        name = "bfloat16" if kind == "none" else kind
        lines.append(f"| {name} | {sizes[0]} | {peaks[0]} | {sizes[1]} | {peaks[1]} | {', '.join(ratios)} |")
    read = first["largest_read_bytes"] / 2**20
    return "\n".join([*lines, f"\nThe largest leaf takes {read:.0f} MiB in float32, from which leaves are quantised."]) + "\n"


def ranks(results: dict) -> str:
    """Resident memory of ranks with a model in parts."""
    machine, options, worlds = results["machine"], results["options"], results["largest"]
    one = worlds["1"]
    lines = [
        f"## {one['held_bytes'] / 4e9:.2f} B parameters in parts on several ranks ({machine['device']})\n",
        _described(machine),
        f"Random weights in float32, all of which train with AdamW, one document of {options['tokens']} tokens a rank; ranks talk by "
        "gloo. MiB of the rank that took most, over what it had before, one run each: own memory at the peak, with pages of files and "
        "libraries in brackets. "
        f"A layer has {one['layer_bytes'] / 2**20:.0f} MiB, the largest leaf {one['largest_leaf_bytes'] / 2**20:.0f}. A checkpoint is "
        "written from the weights and moments themselves, with --async-save from copies, and read beside them.\n",
        "| ranks | weights of a rank | loading | one step | checkpoint | copied | read | saving | one rank over it, in this order |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    phases = ("load", "step", "checkpoint", "copied", "resume", "save")
    for world, row in worlds.items():
        peaks = [f"{row[f'{what}_peak_bytes'] / 2**20:.0f} ({row[f'{what}_resident_peak_bytes'] / 2**20:.0f})" for what in phases]
        ratios = ", ".join(f"{one[f'{what}_peak_bytes'] / row[f'{what}_peak_bytes']:.2f}" for what in phases)
        lines.append(f"| {world} | {row['held_bytes'] / 2**20:.0f} | {' | '.join(peaks)} | {ratios} |")
    return "\n".join(lines) + "\n"


def overlap(results: dict) -> str:
    """Steps over a slowed link, and the efficiency that counted messages predict."""
    machine, options, messages = results["machine"], results["options"], results["messages"]
    lines = [
        f"## Messages that travel while layers compute ({machine['device']})\n",
        _described(machine),
        f"{options['ranks']} processes over gloo, full training of {options['layers']} layers with rematerialisation; the link is slowed, "
        "so that all messages of a step take a part of the time of its computation: that of the CPU, or of layers that wait as they would "
        f"for a device. Seconds of a step, medians of {options['rounds']} rounds in turn.\n",
        "| computation | free link | all messages | step | each message waited for | step over the longer of both |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in results["ranks"][0]["times"].items():
        for row in times["links"].values():
            longer = max(times["free_s"], row["communication_s"])
            seconds = (times["free_s"], row["communication_s"], row["step_s"], row["one_after_another_s"])
            lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in seconds)} | {row['step_s'] / longer:.2f} |")
    networks, predicted = results["networks"], results["predicted"]
    lines += [
        f"\nMessages of a layer: {messages['gather']:.0f} gathers (the last layer stays for the way back) and {messages['sum']:.0f} sum; "
        f"{messages['outside layers']} outside layers. Predicted from the order in which they are begun, for Llama-3.1-8B, "
        "full training in bfloat16 with rematerialisation, "
        f"8192 tokens a GPU in {options['compute_s']} s:\n",
        "| GPUs | latency (us), rate (GB/s) | all messages (s) | step (s) | efficiency | without overlap |",
        "|---|---|---|---|---|---|",
    ]
    for gpus, row in predicted.items():
        network = f"{networks[gpus]['latency_s'] * 1e6:.0f}, {networks[gpus]['bytes_per_s'] / 1e9:.0f}"
        efficiencies = f"{row['efficiency']:.3f} | {row['one_after_another']:.3f}"
        lines.append(f"| {gpus} | {network} | {row['messages_s']:.3f} | {row['step_s']:.3f} | {efficiencies} |")
    return "\n".join(lines) + "\n"


def plan_peaks(results: dict) -> str:
    """Peaks of plans and of the runs that they are of."""
    machine, rows = results["machine"], results["rows"]
    lines = [
        f"## Planned peaks of memory ({machine['device']})\n",
        _described(machine),
        "Runs of two steps of a model of 0.7 M parameters, from loading to the last save, on one process and on ranks over gloo; the most "
        f"that torch holds at once, of the rank that holds most. {len(rows)} kinds, planned over measured from {results['lowest']:.3f} to "
        f"{results['highest']:.3f}.\n",
        "| run | planned (MiB) | measured (MiB) | ratio |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['run']} | {row['planned'] / 2**20:.2f} | {row['measured'] / 2**20:.2f} | {row['ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def _held(side: dict) -> int:
    """What a process has at the peak of a step but for what trains: the loaded model, and what the step takes."""
    return side["load_left_bytes"] + side["step_peak_bytes"] - side["adapter_bytes"]


def step_dpo(results: dict) -> str:
    """One DPO step against TRL."""
    machine, options = results["machine"], results["options"]
    lines = [
        f"## One DPO step with LoRA ({machine['device']})\n",
        _described(machine),
        "SmolLM2-135M-Instruct, LoRA r 16 on all linear layers, the base as the reference at every step, GSM8K pairs in file order, "
        f"{options['pairs']} a step in micro-batches of {options['micro']}, {options['steps'] - 1} timed steps a run, 3 runs a side.\n",
        "| dtype | side | s a pair | peak memory (GiB) | first loss | scored tokens | computed tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    dtypes = [dtype for dtype in ("float32", "bfloat16") if dtype in results]
    for dtype in dtypes:
        lines += [_pair_row(dtype, side, results[dtype][key]) for side, key in (("treetune", "ours"), ("TRL + PEFT", "trl"))]
    for dtype in dtypes:
        ratio, rates = results[dtype]["ratio"], results[dtype]["gemm_gflop_per_s"]
        products = " and ".join(f"{rate:.0f}" for rate in rates)
        lines.append(
            f"\n{dtype}: {ratio['speed']:.2f} x the speed at {ratio['memory']:.2f} x the memory (matrix product: {products} GFLOP/s)."
        )
    lines.append(
        "\nScored and computed tokens are of all steps of a run; computed ones are those that a forward pass goes over, with padding."
    )
    return "\n".join(lines) + "\n"


def step_grpo(results: dict) -> str:
    """One GRPO step against TRL."""
    machine, options, ratio = results["machine"], results["options"], results["float32"]["ratio"]
    lines = [
        f"## One GRPO step with LoRA ({machine['device']})\n",
        _described(machine),
        f"SmolLM2-135M-Instruct, float32, LoRA r 16 on all linear layers, {options['prompts']} GSM8K prompts a step with "
        f"{options['completions']} completions of exactly {options['tokens']} tokens each, sampled from the trainer's own weights (TRL: "
        f"transformers generation), no reference; {options['steps'] - 1} timed steps a run, 3 runs a side.\n",
        "| side | step (s) | of which sampling and rewards (s) | training (s) | peak memory (GiB) |",
        "|---|---|---|---|---|",
    ]
    for key, side in (("ours", "treetune"), ("trl", "TRL + PEFT")):
        run = results["float32"][key]
        lines.append(f"| {side} | {run['step_s']:.2f} | {run['generation_s']:.2f} | {run['training_s']:.2f} | {run['peak_gib']:.2f} |")
    parts = f"sampling {ratio['generation']:.2f} x, training {ratio['training']:.2f} x, at {ratio['memory']:.2f} x the memory"
    return "\n".join([*lines, f"\n{ratio['step']:.2f} x the speed: {parts}."]) + "\n"


def step_ebft(results: dict) -> str:
    """One strided EBFT step against the same step written plainly."""
    machine, options, run = results["machine"], results["options"], results["float32"]
    lines = [
        f"## One strided EBFT step with LoRA ({machine['device']})\n",
        _described(machine),
        f"SmolLM2-135M-Instruct, float32, LoRA r 16 on all linear layers, a document of {options['tokens']} tokens a step, stride "
        f"{options['stride']}, {options['n_samples_per_prompt']} rollouts of {options['generate_max_len']} tokens from each anchor, "
        "whitened features of three layers. The plain side (transformers + PEFT) runs the whole sequence of document and blocks again for "
        f"each token that is sampled, for the features and for training; {options['steps'] - 1} timed steps a run, "
        f"{len(run['runs']['ours'])} runs a side.\n",
        "| side | blocks | step (s) | peak memory (GiB) |",
        "|---|---|---|---|",
    ]
    rows = [("treetune", run["ours"]), ("plain", run["plain"]), *(("treetune", fewer) for fewer in run["fewer_blocks"])]
    lines += [f"| {side} | {one['blocks']:.0f} | {one['step_s']:.2f} | {one['peak_gib']:.2f} |" for side, one in rows]
    ratio = run["ratio"]
    return "\n".join([*lines, f"\n{ratio['step']:.2f} x the speed at {ratio['memory']:.2f} x the memory."]) + "\n"


def generate(results: dict) -> str:
    """Sampling against transformers."""
    machine, options = results["machine"], results["options"]
    lines = [
        f"## Sampling ({machine['device']})\n",
        f"{_described(machine)} SmolLM2-135M-Instruct, {options['dtype']}, GSM8K questions, "
        f"{options['new_tokens']} new tokens a completion, 8 completions of each prompt (batch 1: one of one), "
        f"{options['repeats']} run(s) a side.\n",
        "| batch | treetune (tokens/s) | transformers (tokens/s) | ratio | memory (GiB) |",
        "|---|---|---|---|---|",
    ]
    for batch in (key for key in results if key.isdigit()):
        mine, peer = results[batch]["ours"], results[batch]["transformers"]
        memory = f"{mine['peak_gib']:.2f} and {peer['peak_gib']:.2f}"
        lines.append(f"| {batch} | {mine['tokens_per_s']:.0f} | {peer['tokens_per_s']:.0f} | {results[batch]['speed']:.2f} | {memory} |")
    return "\n".join(lines) + "\n"


def prepare(results: dict) -> str:
    """Preparing rows against TRL."""
    machine = results["machine"]
    names = {"ours": "treetune", "trl": "TRL", "trl_2_workers": "TRL, 2 worker processes"}
    lines = [
        f"## Preparing {results['ours']['rows']:.0f} chat rows ({machine['device']})\n",
        f"{_described(machine)} GSM8K as one-turn chats, SmolLM2's tokenizer.\n",
        "| side | seconds | tokens | supervised |",
        "|---|---|---|---|",
    ]
    for key, name in names.items():
        run = results[key]
        lines.append(f"| {name} | {run['seconds']:.2f} | {run['tokens']:.0f} | {run['supervised']:.0f} |")
    again = f"A second start reads them from the cache in {results['ours']['second_start_s']:.2f} s, the check of all inputs included."
    return "\n".join([*lines, f"\n{results['speed']:.1f} x the speed of TRL's better setting. {again}"]) + "\n"


def _row(dtype: str, side: str, run: dict) -> str:
    numbers = f"{run['supervised_tokens_per_s']:.1f} | {run['step_s']:.2f} | {run['peak_gib']:.2f} | {run['first_loss']:.4f}"
    return f"| {dtype} | {side} | {numbers} |"


def _pair_row(dtype: str, side: str, run: dict) -> str:
    tokens = f"{run['scored_tokens']:.0f} | {run['computed_tokens']:.0f}"
    return f"| {dtype} | {side} | {run['pair_s']:.2f} | {run['peak_gib']:.2f} | {run['first_loss']:.4f} | {tokens} |"


TABLES = {
    "step_sft": step_sft,
    "step_sft_bridged": step_sft_bridged,
    "memory": memory,
    "loading": loading,
    "ranks": ranks,
    "overlap": overlap,
    "plan_peaks": plan_peaks,
    "step_dpo": step_dpo,
    "step_grpo": step_grpo,
    "step_ebft": step_ebft,
    "generate": generate,
    "prepare": prepare,
}


def page() -> str:
    """The page, of every result."""
    parts = [TABLES[path.stem](json.loads(path.read_text())) for path in sorted(harness.RESULTS.glob("*/*.json")) if path.stem in TABLES]
    return "\n".join([HEAD, *parts])


def main() -> None:
    """Write the page."""
    (Path(__file__).parent / "RESULTS.md").write_text(page())


if __name__ == "__main__":
    main()
