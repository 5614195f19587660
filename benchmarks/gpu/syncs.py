"""Two training steps in which the host must not wait for the device: python syncs.py METHOD, then two with their batches and records."""

import sys
import traceback

import device
import shapes

from treetune.core.run import recorder


def attempt(name: str, fn) -> None:
    """Report whether fn() ran without a wait, and else where it waited."""
    try:
        with device.no_syncs():
            fn()
    except Exception:
        device.report(name, ok=False, error=traceback.format_exc().strip().splitlines()[-14:])
    else:
        device.report(name, ok=True)


def main(method: str) -> None:
    start = shapes.model("qwen2.5-0.5b", num_layers=4)
    run = shapes.training(start, lora=method == "grpo", method=method)
    state, records = [run.state], recorder.Recorder()

    def step(number: int, micro) -> None:
        state[0], metrics = run.step(state[0], [micro])
        records.push(number, metrics)

    given = [run.batch(number) for number in range(4)]
    for number in range(2):  # kernels compile, the allocator gets its memory
        step(number, given[number])

    def steps_alone() -> None:
        for number in (2, 3):
            state[0], _ = run.step(state[0], [given[number]])

    def steps_with_batches() -> None:
        for number in (4, 5):
            step(number, run.batch(number))

    attempt(f"{method}: steps", steps_alone)
    attempt(f"{method}: steps, batches and records", steps_with_batches)
    record = records.flush()
    assert record is not None
    device.report(f"{method}: last record", loss=record["loss"], grad_norm=record["grad_norm"])


if __name__ == "__main__":
    main(sys.argv[1])
