"""Strided mode of `treetune ebft`: short rollouts from anchors inside documents, compared with what the documents say there."""

from functools import partial

from treetune.cli.methods.method import Parts, Setting
from treetune.cli.options.ebft import Ebft, EbftOptions, norm
from treetune.core.config import table
from treetune.core.data import kinds, strides
from treetune.core.rollout import strided_rollouts
from treetune.losses import ebft, ebft_objective, ebft_rewards
from treetune.losses.ebft_rewards import Comparison
from treetune.models import decoder_attention, feature_network, sampling
from treetune.models import policy as policies
from treetune.models.feature_network import FeatureNetwork
from treetune.models.policy import Policy


def dataset(options: EbftOptions) -> kinds.DatasetSpec:
    """The rows that strided mode reads: documents without a block only where cross-entropy trains, too."""
    return kinds.strided(_places(options), blocks=options.rl_coef != 0)


def _places(options: EbftOptions) -> strides.Places:
    return table.record(strides.Places, options, needed=options.ce_coef == 0)


def parts(config: Ebft, policy: Policy, network: FeatureNetwork, comparison: Comparison, setting: Setting) -> Parts:
    """Strided mode for one model: rollouts and their scores are made anew for each step, from its weights."""
    options, temperature, n = config.ebft, config.rollout.temperature, config.ebft.n_samples_per_prompt
    assert temperature is not None  # of the mode, where none is given
    for text in _describe(options, policy.cfg.num_layers):
        setting.say(text)
    logprob = partial(policies.logprob_beside, policy, temperature=temperature)
    objective = partial(ebft_objective.objective, rl_coef=options.rl_coef, ce_coef=options.ce_coef)
    train, evaluation = objective(logprob(remat=config.optim.remat, documents=options.ce_coef != 0)), objective(logprob())
    rollouts = strided_rollouts.StridedRollouts(
        _places(options),
        n,
        options.rl_coef != 0,
        sampling.branch_sampler(policy, n, temperature=temperature, top_p=config.rollout.top_p, seed=config.optim.seed),
        partial(decoder_attention.plan, cfg=policy.cfg, device=setting.device),
        partial(feature_network.of_blocks, network.phi, n),
        partial(ebft_rewards.of_blocks, estimator=options.advantage_estimator, comparison=comparison),
        setting.device,
    )
    prepare = partial(strided_rollouts.prepare, rollouts, mesh=setting.ranks.mesh)
    return Parts(network.policy, train, evaluation, (strides.collate,), prepare=prepare)


def _describe(options: EbftOptions, num_layers: int) -> list[str]:
    """What is compared, and what one rollout alone cannot have."""
    layers = ", ".join(map(str, ebft.layers(options.feature_layers, num_layers)))
    scale = norm(vars(options)) + (f", whitened in {options.whitening_space}" if options.use_whitening else "")
    lines = [f"features: layers {layers} of {num_layers}, {options.embed_method}, {scale}"]
    if options.n_samples_per_prompt == 1:
        plain = options.advantage_estimator == "reinforce"
        lines.append("one rollout from each anchor: diversity is 0" + ("" if plain else ", and the advantage is the reward itself"))
    return lines
