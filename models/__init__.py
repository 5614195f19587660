"""Model families: what `families` defines, loaded at first use, because finding a model (`fetch`) needs no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treetune.models.families import MODELS, Family, Model, bare, logprobs, logprobs_beside, logprobs_routed

__all__ = ["MODELS", "Family", "Model", "bare", "logprobs", "logprobs_beside", "logprobs_routed"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from treetune.models import families

    globals().update({public: getattr(families, public) for public in __all__})
    return globals()[name]
