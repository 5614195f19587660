"""Options of the loss of supervised tokens. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from treetune.cli.options.doors import door
from treetune.core.config.marks import OBJECTIVE, unused_if, unused_unless
from treetune.core.config.ranges import BELOW_ONE, NOT_NEGATIVE
from treetune.losses import presets

NAMES = tuple(name for name in presets.TOKEN_LOSSES if name != "smoothed")  # the option label_smoothing asks for that one
TOKEN_LOSS = door(NAMES, "token loss", "logp", "entropy", "lse", "mean_logit", "logsq", "top1", "topk_entropy")
ADAPTED = unused_unless("adapter", "none", reason="an adapter trains on weights that --quant rounds")
SHARDED = unused_if("sharding", "full", reason="weights are rounded whole, and sharding is full")


@dataclass(frozen=True)
class LossOptions:
    """Loss."""

    loss: Annotated[str, TOKEN_LOSS, OBJECTIVE] = "nll"
    """Token loss: likelihood; dft weighs tokens by their probability, eaft by the entropy of the top 20; or a function of your own."""
    label_smoothing: Annotated[float, BELOW_ONE, OBJECTIVE, unused_unless("loss", "nll", reason="the loss is {loss}")] = 0.0
    """Share of the target probability spread evenly over the vocabulary (nll only)."""
    z_loss_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the squared log-normaliser; 1e-4 is usual."""
    router_aux_loss_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Experts: weight of the load-balancing loss, within each sequence, averaged over layers and supervised tokens; 0.001 is usual."""
    router_z_loss_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Experts: weight of the routers' squared log-normaliser, averaged likewise; 0.001 is usual."""
    qat: Annotated[Literal["none", "nf4", "fp4", "int4", "int8", "fp8"], OBJECTIVE, ADAPTED, SHARDED] = "none"
    """Round the weights that train to this format in every forward pass, so that the saved model loses little when it is quantised."""
    neftune_noise_alpha: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Noise on the embeddings while training; 5 is usual, 0 is off."""
