"""One strided EBFT step with LoRA: treetune against the same step written plainly, interleaved, each run in its own process.

SmolLM2-135M-Instruct, float32, LoRA r 16 alpha 32 on all linear layers, one document of 512 tokens a step, stride 8, context 8, rollouts
of 8 tokens, 4 from each of the 63 anchors, temperature 0.6, whitened features of the last token at three depths, rloo, Adam.
The plain side (transformers + PEFT, SDPA with a dense mask) does what is simplest: the document once for each rollout of an anchor, all
blocks behind it in one sequence, and the whole sequence run again for every token that is sampled, for the features and for training.
It is spared the head on rows that nobody reads. The first step warms up; the rest are timed.

    python benchmarks/step_ebft.py        (needs the extra `bench`)
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
import torch

TEXT = Path(__file__).parent.parent / "examples" / "data" / "shakespeare_sample.jsonl"
SIZE, STRIDE, CONTEXT, LENGTH, ROLLOUTS, HEAT, LAYERS = 512, 8, 8, 8, 4, 0.6, (0.25, 0.5, 0.75)
RANK, ALPHA, LR = 16, 32, 1e-5


def documents(folder: str, steps: int) -> list[list[int]]:
    """Documents of exactly SIZE tokens."""
    from treetune.models import hf

    texts = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]
    ids = hf.tokenizer(folder).encode("\n".join(texts), add_special_tokens=False)
    return [ids[i * SIZE : (i + 1) * SIZE] for i in range(steps)]


def ours(args: argparse.Namespace) -> dict:
    """The step of treetune, as its command line builds it."""
    from treetune.cli import assembly, fit
    from treetune.cli.options.ebft import Ebft, EbftData, EbftOptim, EbftOptions, EbftRollout
    from treetune.cli.options.model import AdapterOptions, ModelOptions
    from treetune.cli.options.run import RunOptions

    folder = Path(tempfile.mkdtemp())
    rows = [{"input_ids": ids, "labels": ids} for ids in documents(args.model, args.steps)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = Ebft(
        model=ModelOptions(model=args.model, dtype="float32"),
        data=EbftData(data=(str(folder / "rows.jsonl"),), sequence_len=SIZE, val_set_size=0, shuffle=False),
        adapter=AdapterOptions(lora_r=RANK, lora_alpha=ALPHA),
        ebft=EbftOptions(
            mode="strided", stride=args.stride, context_length=CONTEXT, generate_max_len=LENGTH, n_samples_per_prompt=ROLLOUTS,
            feature_layers=LAYERS, use_whitening=True,
        ),
        rollout=EbftRollout(temperature=HEAT),
        optim=EbftOptim(
            learning_rate=LR, max_steps=args.steps, warmup_steps=0, micro_batch_size=1, gradient_accumulation_steps=1
        ),
        run=RunOptions(output_dir=str(folder / "run")),
    )  # fmt: skip
    times, blocks = [], 0
    with contextlib.ExitStack() as stack:
        made = assembly.assemble(fit.begin(config, (), frozenset(), stack), None, stack)
        state, source = made.state, made.supply.source
        for i in range(args.steps):
            if i == 1:
                start = quiet.mark()
            begun = time.perf_counter()
            micro_batches, _ = source.next(state, i + 1)
            state, metrics = made.step(state, micro_batches)
            metrics["loss"].item()
            times.append(time.perf_counter() - begun)
            blocks = int(metrics["ebft/num_blocks"])
    return summary(times, start, blocks)


def summary(times: list[float], start: quiet.Mark, blocks: int) -> dict:
    """The median of the steps after the first."""
    busy = quiet.busy_cores(start, quiet.mark())
    return {"step_s": statistics.median(times[1:]), "blocks": blocks, "peak_gib": harness.peak_gib(), "others_busy_cores": busy}


def plain(args: argparse.Namespace) -> dict:
    """The same step with transformers and PEFT: everything is run again."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    peft = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, peft).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    times, anchors = [], torch.arange(CONTEXT, SIZE - LENGTH + 1, args.stride)
    for i, ids in enumerate(documents(args.model, args.steps)):
        if i == 1:
            start = quiet.mark()
        begun = time.perf_counter()
        plain_step(model, optimizer, torch.tensor(ids), anchors)
        times.append(time.perf_counter() - begun)
    return summary(times, start, len(anchors))


def plain_step(model, optimizer, document: torch.Tensor, anchors: torch.Tensor) -> None:
    """Sample, compare, train."""
    with torch.no_grad():
        tokens = sampled(model, document, anchors)
        with model.disable_adapter():
            gain = advantages(model, tokens, anchors)  # [n, K]
    rows = torch.cat([anchors - 1, torch.arange(SIZE, tokens.shape[1] - len(anchors))])  # that predict the sampled tokens, step-major
    logits = read(model, tokens, anchors, rows) / HEAT
    logp = logits.log_softmax(-1).gather(2, tokens[:, SIZE:, None])[..., 0]
    loss = -(gain.repeat(1, LENGTH) * logp).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def sampled(model, document: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """[n, SIZE + LENGTH K]: the document, then the tokens of all blocks, position by position."""
    tokens = document.repeat(ROLLOUTS, 1)
    for step in range(LENGTH):
        rows = anchors - 1 if step == 0 else torch.arange(tokens.shape[1] - len(anchors), tokens.shape[1])
        p = (read(model, tokens, anchors, rows) / HEAT).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p.flatten(0, 1), 1).view(ROLLOUTS, -1)], dim=1)
    return tokens


def read(model, tokens: torch.Tensor, anchors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits [n, rows, V] of the whole sequence at some rows."""
    body = model.get_base_model()
    return body.lm_head(body.model(**stream(tokens, anchors)).last_hidden_state[:, rows])


def stream(tokens: torch.Tensor, anchors: torch.Tensor) -> dict:
    """Inputs of the model: a block sees the document before its anchor and its own tokens."""
    size, behind = tokens.shape[1], torch.arange(tokens.shape[1] - SIZE)
    block, step = behind % len(anchors), behind // len(anchors)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[SIZE:, :SIZE] = torch.arange(SIZE) < anchors[block][:, None]
    seen[SIZE:, SIZE:] &= block == block[:, None]
    mask = torch.zeros(size, size).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(SIZE), anchors[block] + step])
    return {
        "input_ids": tokens,
        "attention_mask": mask.expand(len(tokens), 1, size, size),
        "position_ids": positions.expand(len(tokens), -1),
    }


def advantages(model, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """[n, K] of whitened features of the last token of each block."""
    from treetune.losses import ebft

    body = model.get_base_model()
    hidden = body.model(**stream(tokens, anchors), output_hidden_states=True).hidden_states
    chosen = [hidden[layer] for layer in ebft.layers(LAYERS, body.config.num_hidden_layers)]
    last = torch.arange(tokens.shape[1] - len(anchors), tokens.shape[1])
    phi = ebft.per_layer([x[:, last].transpose(0, 1) for x in chosen])  # [K, n, D]
    y = ebft.per_layer([x[0, anchors + LENGTH - 1] for x in chosen])  # [K, D]
    return ebft.rloo(ebft.scores(*ebft.whiten_features(phi, y)).reward).T.float()


def drive(args: argparse.Namespace) -> None:
    """Both sides in turn, then ours with fewer blocks; medians and ratios to JSON."""
    common = ["--model", args.model, "--steps", str(args.steps)]
    rounds = [[quiet.undisturbed(__file__, ["--side", side, *common]) for side in ("ours", "plain")] for _ in range(args.repeats)]
    mine, peer = (list(side) for side in zip(*rounds, strict=True))
    fewer = [quiet.undisturbed(__file__, ["--side", "ours", "--stride", str(stride), *common]) for stride in (16, 32, 64)]
    a, b = harness.medians(mine), harness.medians(peer)
    ratio = {"step": b["step_s"] / a["step_s"], "memory": a["peak_gib"] / b["peak_gib"]}
    options = {"tokens": SIZE, "stride": STRIDE, "generate_max_len": LENGTH, "n_samples_per_prompt": ROLLOUTS, "steps": args.steps}
    found = {"ours": a, "plain": b, "ratio": ratio, "fewer_blocks": fewer, "runs": {"ours": mine, "plain": peer}}
    result = {"benchmark": "step_ebft", "machine": harness.machine(), "options": options, "float32": found}
    print(json.dumps(ratio), "saved", harness.save("step_ebft", result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--side", default=None, choices=["ours", "plain"])
    parser.add_argument("--stride", type=int, default=STRIDE)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.model = args.model or step_sft.model_folder()
    if args.side is None:
        drive(args)
        return
    print(json.dumps({"ours": ours, "plain": plain}[args.side](args)))


if __name__ == "__main__":
    main()
