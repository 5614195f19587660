"""The training commands: a screen around `fit.run`."""

import sys
from dataclasses import replace
from pathlib import Path

from treetune.cli import fit, invocation
from treetune.cli.commands import lm_eval
from treetune.cli.methods import of_config
from treetune.cli.run import TrainConfig
from treetune.cli.screen import Screen
from treetune.core.run import launch
from treetune.core.run.errors import checking_input
from treetune.core.run.lines import Metrics


def run(config: TrainConfig, options: frozenset[str]) -> int:
    """Train and leave a run folder, in several processes where asked; the exit code. options: names of those that the user set."""
    if (config.run.nproc * config.run.nnodes > 1 or config.run.use_ray) and not launch.inside():
        return _launch(config)
    if config.run.restarts and launch.restarted():
        config = replace(config, run=replace(config.run, **launch.continued(Path(config.run.output_dir or ""))))
    method, pipeline = of_config(config), getattr(config, "pipeline", None)
    completions = 0 if pipeline is None else pipeline.num_completions_to_print
    metrics = Metrics(method.shown, method.goal, method.perplexity, completions)
    console = Screen(every=config.run.logging_steps, metrics=metrics, level=config.run.log_level)
    if config.run.lm_eval_tasks:
        with checking_input():
            lm_eval.check(config.run.lm_eval_tasks)
    try:
        result = fit.run(config, observers=[console], options=options, interrupted=console.interrupt)
    finally:
        console.stop()
    if result.signum is not None and result.stopped == "interrupted":
        return 128 + result.signum
    if config.run.lm_eval_tasks:
        saved, unsent = result.folder / ("model" if result.policy.leaves_model else "adapter"), result.unsent
        del result  # two models need more memory than one
        return lm_eval.after_training(saved, config.run.lm_eval_tasks, config.run.lm_eval_batch_size, config.model) or bool(unsent)
    return 1 if result.unsent else 0  # the screen has said why, and what uploads it


def _launch(config: TrainConfig) -> int:
    """Start this command in several processes."""
    words, options = invocation.words(), config.run
    if options.use_ray:
        from treetune.cli import ray_launch

        return ray_launch.run(words, options.nproc * options.nnodes, device=config.model.device, restarts=options.restarts)
    started = launch.Launch(options.nproc, options.nnodes, options.rendezvous, options.restarts)
    return launch.run(["-m", "treetune.cli.main", *words], started, lambda text: print(f"treetune: {text}", file=sys.stderr))
