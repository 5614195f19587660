"""Training from Python: the runs of the command line as function calls. `python examples/fit.py sft|dpo|grpo MODEL ROWS`."""

import sys

from treetune.cli.fit import Result, configure, fit


def curve(event: str, record: dict) -> None:
    """A tracker: it is called with each event of a run."""
    if event == "step":
        print(f"step {record['step']}: loss {record['train/loss']:.4f}")


def sft(model: str, rows: str, **options) -> Result:
    """Fine-tune an adapter on chats."""
    config = configure("sft", model=model, data=[rows], **options)
    return fit(config, observers=[curve])


def dpo(model: str, rows: str, **options) -> Result:
    """Learn from pairs."""
    config = configure("dpo", model=model, data=[rows], rl_beta=0.1, **options)
    return fit(config, observers=[curve])


def grpo(model: str, rows: str, reward: str = "examples/rewards.py:close", **options) -> Result:
    """Learn from the rewards of sampled completions."""
    config = configure("grpo", model=model, data=[rows], reward_funcs=[reward], **options)
    return fit(config, observers=[curve])


if __name__ == "__main__":
    method, model, rows = sys.argv[1:]
    result = {"sft": sft, "dpo": dpo, "grpo": grpo}[method](model, rows)
    print(f"{result.folder}: {len(result.history)} records, step {int(result.state.step)}")
