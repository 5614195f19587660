"""Metrics on their way from a GPU, which is played by tensors on the CPU whose copies arrive late."""

import torch

from treetune.core.run import recorder

STEPS = [
    {"loss": torch.tensor(0.1 + step), "tokens": torch.tensor(7 * step), "wide": torch.tensor(1 / 3, dtype=torch.float64), "epoch": 0.5}
    for step in range(4)
]


def records():
    """The items of all records in order; None where there was nothing to read."""
    seen = recorder.Recorder()
    read = [seen.push(step, metrics) for step, metrics in enumerate(STEPS)] + [seen.flush(), seen.flush()]
    return [None if record is None else list(record.items()) for record in read]


def test_records_are_those_of_a_cpu_in_one_copy_a_step_read_one_step_late(monkeypatch):
    plain, events = records(), []

    def send(values):
        copy = torch.full_like(values, torch.nan)
        events.append(f"sent {float(values[0]):.1f}")
        return copy, lambda: (events.append(f"waited {float(values[0]):.1f}"), copy.copy_(values))

    monkeypatch.setattr(recorder, "on_gpu", lambda value: True)
    monkeypatch.setattr(recorder, "send", send)
    assert records() == plain
    assert plain[1] == [("step", 0), ("loss", STEPS[0]["loss"].item()), ("tokens", 0), ("wide", 1 / 3), ("epoch", 0.5)]
    assert [type(value) for _, value in plain[1]] == [int, float, int, float, float]
    # The record of a step is read, before the next one is sent: never that of the step just queued.
    assert events == [f"{what} {number}.1" for number in range(4) for what in ("sent", "waited")]
