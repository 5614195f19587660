"""Models whose frozen layers are away: losses, gradients and samples are those of the same model on the device, to the bit."""

import itertools
import weakref

import pytest
import torch

from treetune.core import layer_offload, tree
from treetune.core.quant import Scheme
from treetune.models import decode, families, features, hf, policy
from treetune.models.decoder_attention import plan

CPU = torch.device("cpu")
POLICIES = (None, "full", "selective", "none+disk", "full+disk", "selective+disk")


class Copies:
    """A lane to a device of its own, in the memory of this one: which layers are sent, and how many bytes are there at once."""

    def __init__(self):
        self.sent, self.alive, self.most = [], weakref.WeakSet(), 0

    def send(self, parts):
        copies = [part.clone() for part in parts]
        self.alive.update(copies)
        self.sent.append(tuple(part.data_ptr() for part in parts))
        self.most = max(self.most, sum(copy.nbytes for copy in self.alive))
        return copies, None

    def wait(self, mark):
        pass

    def drop(self, parts):
        pass


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(layer_offload, "SMALL", 256)


@pytest.fixture
def copies(monkeypatch):
    lane = Copies()
    monkeypatch.setattr(layer_offload, "way", lambda device: lane)
    return lane


def put_away(model):
    """The model with its layers in files, and the bytes of the largest."""
    params = layer_offload.away(model.params, layer_offload.home("disk", CPU))
    return model._replace(params=params), max(layer_offload.elsewhere(layer, CPU) for layer in params["layers"])


FAST = [("qwen3_moe", "lora"), ("gpt_oss", "nf4"), ("glm4", "nf4"), ("qwen3_5_text", "lora")]
KINDS = [("llama", kind) for kind in ("lora", "nf4", "dora")] + [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(("qwen3_moe", "gpt_oss", "glm4", "qwen3_5_text"), ("lora", "nf4"))
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_gradients_are_the_same_to_the_bit_and_two_layers_are_there(family, kind, folder, copies, passes):
    model, batch = hf.load(folder(family), scheme=Scheme("nf4") if kind == "nf4" else None), passes.stream()
    far, largest = put_away(model)
    for remat in POLICIES if (family, kind) == ("llama", "lora") else (None, "selective", "full+disk"):
        value, expected = passes.gradient(model, kind, remat, batch)
        copies.sent.clear()
        copies.most = 0
        other, grads = passes.gradient(far, kind, remat, batch)
        assert torch.equal(value, other), remat
        for (path, a), (_, b) in zip(tree.items(expected), tree.items(grads), strict=True):
            assert torch.equal(a, b), (remat, path)
        assert not copies.alive and largest <= copies.most <= 3 * largest, remat


def test_a_pass_and_its_way_back_send_each_layer_once_each_way(folder, copies, passes):
    far, _ = put_away(hf.load(folder("llama")))
    for remat in POLICIES:
        copies.sent.clear()
        passes.gradient(far, "lora", remat, passes.stream())
        names = {parts: index for index, parts in enumerate(dict.fromkeys(copies.sent))}
        order, last = [names[parts] for parts in copies.sent], len(names) - 1
        assert order == [*range(last + 1), *reversed(range(last - 1))], remat


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_samples_and_features_are_those_of_a_model_that_is_there(family, kind, folder, copies, passes):
    model = hf.load(folder(family))
    far, _ = put_away(model)
    low = passes.adapted(model, 0.0)
    low = passes.lengthened(low, model) if kind == "dora" else low
    options = {"n": 2, "max_new_tokens": 5, "seed": 3, "lora": low}
    for a, b in zip(decode.sample(model, [[3, 4, 5], [6, 7]], **options), decode.sample(far, [[3, 4, 5], [6, 7]], **options), strict=True):
        assert torch.equal(a, b)
    batch = passes.stream()
    rest = batch, plan(batch, model.cfg), batch["at"]
    both = [features.hidden(one.family, one.cfg, one.params, *rest, layers=[1, 2]) for one in (model, far)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert copies.sent and not copies.alive


@pytest.mark.sampled(4)
@pytest.mark.parametrize("scheme", [None, Scheme("nf4"), Scheme("int8"), Scheme("fp8")])
@pytest.mark.parametrize("family", ["llama", "glm4", "deepseek_v3"])
def test_layers_go_as_they_are_read(family, scheme, folder, passes):
    plain = hf.load(folder(family), scheme=scheme)
    far = hf.load(folder(family), scheme=scheme, home=layer_offload.home("disk", CPU))
    large = sum(part.nbytes for leaf in tree.leaves(plain.params["layers"]) for part in layer_offload._parts(leaf) if part.nbytes >= 256)
    assert layer_offload.elsewhere(far.params, CPU) == large > 0
    for name in far.params.keys() - {"layers"}:
        assert layer_offload.elsewhere(far.params[name], CPU) == 0, name
    batch = passes.stream()
    both = [families.logprobs(one.family, one.cfg, one.params, batch).logp for one in (plain, far)]
    assert torch.equal(*both)


def test_weights_that_train_are_copies_on_the_device(folder):
    far, _ = put_away(hf.load(folder("llama")))
    start = policy.full(far, ("layers.0.q_proj",))
    assert layer_offload.elsewhere(start.params, CPU) == 0 and layer_offload.elsewhere(start.frozen, CPU) > 0


def test_a_run_without_frozen_layers_is_refused(folder):
    start = policy.full(hf.load(folder("llama")))
    with pytest.raises(ValueError, match="layer_offloading is of frozen layers, and all layers of this run train"):
        policy.offload(start, layer_offload.home("disk", CPU))
    assert policy.offload(start, None) is start
