"""The training commands: a screen around `fit.run`."""

from treetune.cli import fit
from treetune.cli.methods import of_config
from treetune.cli.run import TrainConfig
from treetune.cli.screen import Screen
from treetune.core.run.lines import Metrics


def run(config: TrainConfig, options: frozenset[str]) -> int:
    """Train and leave a run folder; the exit code. options: names of those that the user set."""
    method, pipeline = of_config(config), getattr(config, "pipeline", None)
    completions = 0 if pipeline is None else pipeline.num_completions_to_print
    metrics = Metrics(method.shown, method.goal, method.perplexity, completions)
    console = Screen(every=config.run.logging_steps, metrics=metrics, level=config.run.log_level)
    try:
        result = fit.run(config, observers=[console], options=options, interrupted=console.interrupt)
    finally:
        console.stop()
    return 128 + result.signum if result.signum is not None and result.stopped == "interrupted" else 0
