"""The frozen network of `treetune ebft` and the comparison of its features, from options."""

from functools import partial

from treetune.cli.options.ebft import EbftOptions
from treetune.core.config import table
from treetune.losses import ebft, ebft_rewards
from treetune.models import feature_network
from treetune.models.feature_network import FeatureNetwork
from treetune.models.policy import Policy


def build(options: EbftOptions, policy: Policy) -> FeatureNetwork:
    """The network that the options describe, without the adapter of the run."""
    layers = ebft.layers(options.feature_layers, policy.cfg.num_layers)
    recipe = feature_network.Recipe(layers, ebft_rewards.NORMS[norm(options)], partial(ebft_rewards.pool, method=options.embed_method))
    return feature_network.build(policy, recipe, on_cpu=options.feature_device == "cpu")


def norm(options: EbftOptions) -> str:
    """How hidden states are scaled at each token."""
    return options.feature_norm or ("per_layer" if options.mode == "strided" else "raw")


def comparison(options: EbftOptions) -> ebft_rewards.Comparison:
    """How rollouts are scored; structured mode compares vectors of length 1 unless they are whitened."""
    whitening = options.whitening_space if options.use_whitening else None
    return table.record(ebft_rewards.Comparison, options, whitening=whitening, unit_length=options.mode == "structured")
