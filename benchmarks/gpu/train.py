"""20 steps on packed tokens, and the profile of a further one: python train.py SHAPE; LoRA for the large shape, else all weights."""

import statistics
import sys
import time

import device
import harness
import shapes

from treetune.core.run import recorder

STEPS, WARM = (4, 1) if device.DRY else (20, 3)


def main(name: str) -> None:
    lora = name.startswith("llama")
    run = shapes.training(shapes.model(name), lora=lora)
    records, state, host = recorder.Recorder(), run.state, []
    run = run._replace(state=None)  # the step consumes the state: nothing else may hold its leaves

    def step(number: int) -> None:
        nonlocal state
        called = time.perf_counter()
        state, metrics = run.step(state, [run.batch(number)])
        host.append(time.perf_counter() - called)
        records.push(number, metrics)

    seconds = device.step_seconds(step, steps=STEPS, warm=WARM)
    records.flush()
    losses = [record["loss"] for record in records.history]
    device.report(
        f"{name} {'LoRA' if lora else 'full'}: treetune", step_ms=1e3 * seconds, tokens_per_s=shapes.TOKENS / seconds,
        host_ms=1e3 * statistics.median(host[WARM:]), peak_gib=harness.peak_gib(), first_loss=losses[0], last_loss=losses[-1],
    )  # fmt: skip
    batch = run.batch(STEPS)
    table, counts = device.profiled(lambda: run.step(state, [batch]))
    device.report(f"{name}: profile of a step", text=table, **counts)


if __name__ == "__main__":
    main(sys.argv[1])
