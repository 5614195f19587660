"""The frozen network of energy-based fine-tuning, and what its features say of rollouts: pooled vectors, scores, advantages.

N rows of B sequences in a stream; P groups (a prompt, or an anchor of a document) of n rollouts; D features.
"""

from torch import Tensor

from treetune.cli.methods.ebft import EbftOptions
from treetune.losses import ebft
from treetune.models import feature_network
from treetune.models.feature_network import FeatureNetwork, SequenceRows
from treetune.models.policy import Policy

NORMS = {"per_layer": ebft.per_layer, "joint": ebft.joint, "raw": ebft.raw}
WHITEN = {"features": ebft.whiten_features, "rows": ebft.whiten_rows}


def build(options: EbftOptions, policy: Policy) -> FeatureNetwork:
    """The network that the options describe, without the adapter of the run."""
    pool = getattr(ebft, options.embed_method)

    def pooled(x: Tensor, rows: SequenceRows) -> Tensor:
        lengths = (rows.prompt_lens,) if options.embed_method == "completion_mean" else ()
        return pool(x, rows.seq, rows.lens, *lengths)

    layers = ebft.layers(options.feature_layers, policy.cfg.num_layers)
    recipe = feature_network.Recipe(layers, NORMS[norm(options)], pooled)
    return feature_network.build(policy, recipe, on_cpu=options.feature_device == "cpu")


def norm(options: EbftOptions) -> str:
    """How hidden states are scaled at each token."""
    return options.feature_norm or ("per_layer" if options.mode == "strided" else "raw")


def scores(options: EbftOptions, phi: Tensor, y: Tensor) -> ebft.Scores:
    """Rewards of rollouts [P, n, D] against the truth [P, D], whitened or as they are; structured mode compares vectors of length 1."""
    if options.use_whitening:
        phi, y = WHITEN[options.whitening_space](phi, y)
    elif options.mode == "structured":
        phi, y = ebft.unit(phi), ebft.unit(y)
    return ebft.scores(phi, y, alignment_coef=options.alignment_coef, diversity_coef=options.diversity_coef)


def advantages(options: EbftOptions, scored: ebft.Scores) -> Tensor:
    """Advantages [P, n] of the strided mode's estimators; the reward itself for one rollout, which nothing can be compared with."""
    if options.advantage_estimator == "rloo_paired":
        return ebft.rloo_paired(scored, alignment_coef=options.alignment_coef, diversity_coef=options.diversity_coef)
    return getattr(ebft, options.advantage_estimator)(scored.reward)
