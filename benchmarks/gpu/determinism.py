"""The same step twice and 5 steps twice, bit for bit: as runs do it, and with torch.use_deterministic_algorithms."""

import time
import traceback
import warnings

import device
import shapes
import torch

from treetune.core import tree


def trained(method: str, steps: int) -> list[torch.Tensor]:
    """What trains after some steps from a fresh start, on the host, and the last loss."""
    run = shapes.training(shapes.model("qwen2.5-0.5b", num_layers=4), lora=True, method=method)
    state, metrics = run.state, {}
    for number in range(steps):
        state, metrics = run.step(state, [run.batch(number)])
    return [leaf.cpu() for leaf in (*tree.leaves(state.params), metrics["loss"])]


def main() -> None:
    for fixed in (True, False):
        torch.use_deterministic_algorithms(fixed, warn_only=True)
        for method in ("sft", "grpo"):
            for steps in (1, 5):
                label = f"{method}: {steps} steps twice, deterministic algorithms {'on' if fixed else 'off'}"
                begun = time.perf_counter()
                try:
                    with warnings.catch_warnings(record=True) as seen:
                        warnings.simplefilter("always")
                        first, second = trained(method, steps), trained(method, steps)
                except Exception:
                    device.report(label, ok=False, error=traceback.format_exc().strip().splitlines()[-8:])
                    continue
                equal = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
                told = sorted({str(warning.message)[:160] for warning in seen if "determinis" in str(warning.message)})
                outcome = {"ok": all(equal)} if fixed else {"equal": all(equal)}
                device.report(label, **outcome, unequal=equal.count(False), warnings=told, seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
