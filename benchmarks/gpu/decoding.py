"""Tokens a second of treetune's own sampler, and the profile of a few tokens: python decoding.py SHAPE."""

import sys
import time

import device
import harness
import shapes

from treetune.models import decode

PROMPT, NEW, ROWS = (4, 3, (2,)) if device.DRY else (128, 96, (16, 64, 256))


def main(name: str) -> None:
    model = shapes.model(name)

    def sample(rows: int, new: int, seed: int) -> int:
        prompts = shapes.ids(0, rows * PROMPT).reshape(rows, PROMPT).tolist()
        return int(decode.sample(model, prompts, max_new_tokens=new, temperature=1.0, seed=seed).lens.sum())

    sample(ROWS[0], 2, 0)
    for rows in ROWS:
        device.free()
        device.synchronize()
        begun = time.perf_counter()
        count = sample(rows, NEW, 1)
        device.synchronize()
        seconds = time.perf_counter() - begun
        device.report(f"{name}: {rows} rows", tokens_per_s=count / seconds, tokens=count, seconds=seconds, peak_gib=harness.peak_gib())
    table, counts = device.profiled(lambda: sample(ROWS[-1], 3, 2))
    device.report(f"{name}: profile of three tokens of {ROWS[-1]} rows", text=table, **counts)


if __name__ == "__main__":
    main(sys.argv[1])
