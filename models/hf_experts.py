"""Experts in a config.json: how many there are, how many a token goes to, and which layers have them."""

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models.moe import Experts

MOST = {"num_experts": 2**16, "num_local_experts": 2**16, "num_experts_per_tok": 2**16, "moe_intermediate_size": 2**22}
# Options of training: they add terms to a loss, and change no logit.
WITHOUT_EFFECT = ("output_router_logits", "router_aux_loss_coef")
NAMES = ("num_local_experts", "num_experts")


def size(hf: Fields, name: str, default: int) -> int:
    """A size of the experts."""
    return fields.integer(hf, name, default=default, least=1, most=MOST[name])


def count(hf: Fields, default: int) -> int:
    """The number of experts, which transformers reads under two names."""
    both = [size(hf, name, default) for name in NAMES if name in hf.values]
    if len(set(both)) > 1:
        raise fields.wrong(hf, NAMES[1], f"{both[0]}, as {NAMES[0]} says")
    return both[0] if both else default


def check(hf: Fields, experts: Experts) -> Experts:
    """The experts. Raises ValueError where a token goes to more of them than there are, or no layer has any."""
    if experts.top_k > experts.count:
        raise fields.wrong(hf, "num_experts_per_tok", f"at most the number of experts, which is {experts.count}")
    if not experts.layers:
        raise fields.wrong(hf, "mlp_only_layers", "such that some layer has experts: a model without them is of a dense family")
    return experts
