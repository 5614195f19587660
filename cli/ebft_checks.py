"""What options of energy-based fine-tuning may not say: contradictions, and options of the other mode. Imports no torch."""

from typing import Any

from treetune.cli.configs import Ebft
from treetune.cli.errors import BadInput
from treetune.cli.options.ebft import STRIDED_ONLY, STRUCTURED_ONLY

SAMPLED = ("loss", "correction", "pipeline", "engine", "reference")  # groups of options of the run that structured mode shares with grpo
BOTH = ("temperature", "top_p")  # options of sampling that strided mode takes
TWINS = {"num_generations": "n_samples_per_prompt", "max_completion_length": "generate_max_len", "advantage": "advantage_estimator"}
WHOLE_TEXTS = {
    "sample_packing": "structured mode takes micro_batch_size prompts in a forward pass, always packed",
    "overlong": "structured mode drops a prompt that is longer than sequence_len with its true reply: a truth that is cut is none",
    "dataset_prepared_path": "structured mode reads its prompts anew in each run",
}


def check(config: Any) -> None:
    """Raise BadInput for options that contradict each other."""
    if not isinstance(config, Ebft):
        return
    options, strided = config.ebft, config.ebft.mode == "strided"
    if not options.feature_layers or not all(0 <= depth <= 1 for depth in options.feature_layers):
        raise BadInput(
            f"feature_layers must be depths from 0 to 1, at least one, such as 0.25 0.5 0.75, got {list(options.feature_layers)}"
        )
    if options.alignment_coef == 0 and options.diversity_coef == 0:
        raise BadInput("alignment_coef and diversity_coef are both 0, so nothing is rewarded: give one of them a value")
    if config.rollout.temperature == 0:
        raise BadInput(
            "temperature 0 writes the same rollout every time: give a number above 0; 1 (structured) and 0.6 (strided) are usual"
        )
    if strided and options.rl_coef == 0 and options.ce_coef == 0:
        raise BadInput("rl_coef and ce_coef are both 0, so nothing would train: give one of them a value")
    if options.use_whitening and rollouts(config) == 1:
        raise BadInput("use_whitening compares rollouts with each other, and there is one: sample more, or leave out use_whitening")
    if not strided and config.run.sharding == "full" and config.pipeline.streaming_partial_batch:
        raise BadInput(
            "streaming_partial_batch does not go with --sharding full: ranks would gather the feature network at different times"
        )


def rollouts(config: Ebft) -> int:
    """Rollouts of a group: of an anchor or of a prompt."""
    return config.ebft.n_samples_per_prompt if config.ebft.mode == "strided" else config.rollout.num_generations


def ignored(config: Any) -> dict[str, str]:
    """{option: why this run would not look at it}."""
    if not isinstance(config, Ebft):
        return {}
    options, out = config.ebft, {}
    if not options.use_whitening:
        out["whitening_space"] = "use_whitening is off"
    if rollouts(config) == 1:
        out["diversity_coef"] = "there is one rollout, which has nothing to be like"
    return out | (_strided(config) if options.mode == "strided" else _structured(config))


def _strided(config: Ebft) -> dict[str, str]:
    names = [name for group in SAMPLED for name in vars(getattr(config, group))]
    names += [name for name in vars(config.rollout) if name not in BOTH]
    return {name: f"mode is strided{_instead(TWINS.get(name))}" for name in (*names, *STRUCTURED_ONLY)}


def _instead(name: str | None) -> str:
    return f"; the option is --{name.replace('_', '-')}" if name else ""


def _structured(config: Ebft) -> dict[str, str]:
    twins = {strided: whole for whole, strided in TWINS.items()}
    out = {name: f"mode is structured{_instead(twins.get(name))}" for name in STRIDED_ONLY} | WHOLE_TEXTS
    if not config.ebft.adaptive_max_tokens:
        out["gt_length_multiplier"] = "adaptive_max_tokens is off"
    again = "features are never all 0, so no prompt counts as failed"
    return out | {"reroll_start_fraction": again, "reroll_max_groups": again}
