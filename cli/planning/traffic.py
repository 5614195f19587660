"""What devices send each other in a step, by a model: a message takes a latency and its bytes over the link.

With fully sharded weights a layer is gathered forward and backward, and its gradients are summed: three messages, beside what the layers
before and behind it compute. Embedding, last norm and head are waited for.
"""

import math
from typing import Any, NamedTuple

from treetune.core import tree
from treetune.core.quant import Scheme
from treetune.models import memory, quantised
from treetune.models.devices import Device

GRADIENT = 4  # bytes: sums are float32 whatever trains
OUTSIDE = 3  # messages of a pass outside layers: embedding, norm, head


class Traffic(NamedTuple):
    """Bytes of whole leaves that travel for one micro-batch: of all layers once, and outside them once; and of gradients."""

    layers: int
    gathered: float
    summed: float
    outside: float
    summed_outside: float


def numbers(part: Any) -> int:
    """Numbers of a part of an abstract tree."""
    return sum(math.prod(leaf.shape) for leaf in tree.leaves({"": part}))


def sent(layer: Any, model: Any, scheme: Scheme | None) -> int:
    """Bytes of a layer in a message, by a scheme that it is quantised by, if any."""
    return memory.weights(layer, scheme, model.cfg.dtype)


def sharded(run: Any, model: Any, adapter: float, trained: float) -> Traffic:
    """The traffic of fully sharded weights; of an adapter with so many bytes, numbers that train."""
    layers, size = model.abstract["layers"], model.cfg.dtype.itemsize
    travel = sum(sent(layer, model, quantised.of(run.config.model)) for layer in layers)
    head = model.abstract["lm_head"] if "lm_head" in model.abstract else model.abstract["embed_tokens"]
    outside = sum(map(numbers, (model.abstract["embed_tokens"], model.abstract["norm"], head)))
    within = min(trained, numbers(layers))
    # The embedding of a tied model is summed as such, and as the head.
    return Traffic(len(layers), travel + adapter, GRADIENT * within, outside * size, GRADIENT * outside * (trained > within))


def waited(traffic: Traffic, device: Device, ranks: int, computing: float, *, again: bool) -> float:
    """Seconds of a micro-batch in which a device waits for messages, where it computes so long; `again`: layers are computed twice forward.

    Of messages beside layers it waits for what takes longer than the computation, and at the ends: the first gather of each direction, the
    sum behind the last layer.
    """
    count, forward = traffic.layers, computing / (4 if again else 3)

    def message(size: float, messages: int) -> float:
        return messages * device.latency + size * (ranks - 1) / ranks / device.link if size else 0.0

    gathers, sums = message(traffic.gathered, count), message(traffic.summed, count)
    beside = max(0.0, gathers - forward) + max(0.0, gathers + sums - (computing - forward))
    ends = (2 * gathers + sums) / count
    return beside + ends + message(traffic.outside, OUTSIDE) + message(traffic.summed_outside, OUTSIDE)


def beside(seconds: float, computing: float, layers: int, *, again: bool) -> float:
    """Seconds of messages, one a layer, that a device waits for where a backward pass goes on beside all but the last."""
    backward = computing * (3 / 4 if again else 2 / 3)
    return max(seconds / (layers + 1), seconds - backward)


def largest(model: Any, trained: float) -> float:
    """Numbers of the largest message of gradients: a layer, or the embedding."""
    return min(trained, max(map(numbers, [*model.abstract["layers"], model.abstract["embed_tokens"]])))


def present(model: Any, ranks: int, *, adapter: float, trained: bool, copied: bool, scheme: Scheme | None = None) -> int:
    """Bytes of messages and of what is whole at once, of layers that so many ranks have parts of.

    Of one layer the leaves in the compute dtype, of the next the message that brings them, this rank's part of it, and its like for the
    gradients of a layer, which are summed in float32. adapter: bytes in all layers. trained: the layers train, not the adapter alone.
    copied: gloo has copies of its own of what it sends. scheme: of leaves that are quantised, of which the codes are sent.
    """
    size, layers = model.cfg.dtype.itemsize, model.abstract["layers"]
    layer, pairs, message = max(map(numbers, layers)), adapter / len(layers), 1 + 1 / ranks + copied
    gathered = (max(sent(layer, model, scheme) for layer in layers) + pairs) * (1 + message)
    summed = layer * (size + GRADIENT * message) if trained else pairs * (1 + message)
    return round(max(gathered + summed, numbers(model.abstract["embed_tokens"]) * (size + GRADIENT * trained) * message))
