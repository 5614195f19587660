"""`treetune ebft`: energy-based fine-tuning towards the features of true texts, in one of two modes."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options import online
from treetune.cli.options.ebft import RATES, Ebft, norm, one_rollout, only_in
from treetune.core.config import table

if TYPE_CHECKING:
    from treetune.core.data.kinds import DatasetSpec
    from treetune.models.policy import Policy


TEMPERATURES = {"structured": 1.0, "strided": 0.6}
SAMPLED = ("loss", "correction", "pipeline", "engine", "reference")  # groups of options of the run that structured mode shares with grpo
BOTH = ("temperature", "top_p")  # options of sampling that strided mode takes
TWINS = {"num_generations": "n_samples_per_prompt", "max_completion_length": "generate_max_len", "advantage": "advantage_estimator"}
STRUCTURED = {
    "sample_packing": "structured mode takes micro_batch_size prompts in a forward pass, always packed",
    "overlong": "structured mode drops a prompt that is longer than sequence_len with its true reply: a truth that is cut is none",
    "eval_batch_size": "structured mode samples the completions of all held-out prompts, and reads micro_batch_size of these at a time",
    "dataset_prepared_path": "structured mode reads its prompts anew in each run",
} | dict.fromkeys(("reroll_start_fraction", "reroll_max_groups"), "features are never all 0, so no prompt counts as failed")


def conflicts(config: Ebft) -> None:
    """Raise ValueError for options that contradict each other."""
    options, strided = config.ebft, config.ebft.mode == "strided"
    if not options.feature_layers or not all(0 <= depth <= 1 for depth in options.feature_layers):
        raise ValueError(
            f"feature_layers must be depths from 0 to 1, at least one, such as 0.25 0.5 0.75, got {list(options.feature_layers)}"
        )
    if options.alignment_coef == 0 and options.diversity_coef == 0:
        raise ValueError("alignment_coef and diversity_coef are both 0, so nothing is rewarded: give one of them a value")
    if config.rollout.temperature == 0:
        raise ValueError(
            "temperature 0 is greedy decoding, so all rollouts of a group would be identical: give a number above 0, usually 1 "
            "(structured) or 0.6 (strided)"
        )
    if strided and options.rl_coef == 0 and options.ce_coef == 0:
        raise ValueError("rl_coef and ce_coef are both 0, so nothing would train: give one of them a value")
    if options.use_whitening and one_rollout(table.flatten(config)):
        raise ValueError("use_whitening compares rollouts with each other, and there is one: sample more, or leave out use_whitening")
    if strided:
        return
    if config.run.sharding == "full" and config.pipeline.streaming_partial_batch:
        raise ValueError(
            "streaming_partial_batch does not go with --sharding full: ranks would compute the feature network at different times"
        )
    online.conflicts(config)


def unused(config: Ebft) -> dict[str, str]:
    """Strided mode samples and scores in its own way; structured mode reads whole texts."""
    if config.ebft.mode == "structured":
        return STRUCTURED
    names = [name for group in SAMPLED for name in vars(getattr(config, group))]
    names += [name for name in vars(config.rollout) if name not in BOTH]
    return {name: only_in("structured", TWINS.get(name)).reason({"mode": "strided"}) for name in names}


def variant(config: Ebft) -> dict[str, Any]:
    """Strided mode reads documents and is judged by its features' distance; what its loss is a mean over depends on its terms."""
    if config.ebft.mode == "structured":
        return {}
    unit = "generated tokens" if config.ebft.ce_coef == 0 else "generated tokens, and over all tokens of documents,"
    shown = ("ebft/mean_reward", *METHOD.shown[1:])
    return {"data": "strided", "rows": rows, "unit": unit, "shown": shown, "goal": "ebft/cfm_loss"}


def rows(config: Ebft) -> "DatasetSpec":
    """The documents of strided mode, with the places where rollouts start."""
    from treetune.cli.methods import ebft_strided

    return ebft_strided.dataset(config.ebft)


def complete(config: Ebft) -> Ebft:
    """The config with the temperature of its mode, where none is given."""
    if config.rollout.temperature is not None:
        return config
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, temperature=TEMPERATURES[config.ebft.mode]))


def parts(config: Ebft, policy: "Policy", setting: Setting) -> Parts:
    """Features of sampled texts compared with those of true ones."""
    from treetune.cli.methods import ebft_strided, ebft_structured
    from treetune.core.run import ranks
    from treetune.losses import ebft, ebft_rewards
    from treetune.models import feature_network

    options, structured = config.ebft, config.ebft.mode == "structured"
    pool = functools.partial(ebft_rewards.pool, method=options.embed_method)
    layers = ebft.layers(options.feature_layers, policy.cfg.num_layers)
    recipe = feature_network.Recipe(layers, ebft_rewards.NORMS[norm(vars(options))], pool)
    on_cpu = options.feature_device == "cpu"
    hosts = ranks.on_hosts(setting.ranks) if on_cpu else None
    network = feature_network.build(policy, recipe, on_cpu=on_cpu, hosts=hosts)
    # Structured mode compares vectors of length 1 unless they are whitened.
    whitening = options.whitening_space if options.use_whitening else None
    comparison = table.record(ebft_rewards.Comparison, options, whitening=whitening, unit_length=structured)
    mode = ebft_structured if structured else ebft_strided
    return mode.parts(config, policy, network, comparison, setting)


METHOD = Method(
    "ebft",
    "learn from true texts by their features, without a reward function",
    Ebft,
    RATES,
    "truths",
    parts,
    ("reward", "ebft/alignment", "ebft/diversity", "ebft/cfm_loss"),
    "completions",
    goal="reward",
    conflicts=conflicts,
    unused=unused,
    variant=variant,
    complete=complete,
)
