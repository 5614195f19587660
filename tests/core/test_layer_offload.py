"""Layers that are away: what is sent when, what is there at once, and that files come back as they went."""

import gc
import os
import weakref

import pytest
import torch

from treetune.core import layer_offload, quant, shard, tree
from treetune.core.quant import Scheme

CPU = torch.device("cpu")


class Log:
    """A lane to a device of its own, which writes down what it is asked. Marks count what was sent."""

    def __init__(self):
        self.events, self.alive, self.most, self.sent = [], weakref.WeakSet(), 0, 0

    def send(self, parts):
        copies = [part.clone() for part in parts]
        self.alive.update(copies)
        self.most = max(self.most, sum(copy.nbytes for copy in self.alive))
        self.sent += 1
        self.events.append(("send", int(parts[0].flatten()[0])))
        return copies, self.sent

    def wait(self, mark):
        self.events.append(("wait", mark))

    def drop(self, parts):
        self.events.append(("drop", int(parts[0].flatten()[0])))


@pytest.fixture
def log(monkeypatch):
    lane = Log()
    monkeypatch.setattr(layer_offload, "way", lambda device: lane)
    return lane


def layers(count):
    """Layers of one large leaf, full of the layer's number, and one small one; the large ones are in files."""
    put = layer_offload.home("disk", CPU)
    return [{"w": put(torch.full((64, 128), float(index))), "norm": torch.ones(8)} for index in range(count)]


def passed(arriving, order):
    for index in order:
        assert shard.gather(arriving[index]["w"])[0, 0] == index
        assert isinstance(arriving[index]["norm"], torch.Tensor)


def sent(log):
    return [number for name, number in log.events if name == "send"]


def test_a_pass_sends_each_layer_once_and_the_next_one_ahead(log):
    passed(layer_offload.arriving(layers(4), CPU), range(4))
    assert log.events[:5] == [("send", 0), ("send", 1), ("wait", 1), ("drop", 0), ("send", 2)]
    assert sent(log) == [0, 1, 2, 3]


def test_the_way_back_begins_with_the_two_layers_that_are_there(log):
    arriving = layer_offload.arriving(layers(5), CPU)
    passed(arriving, range(5))
    assert sent(log) == [0, 1, 2, 3, 4]
    passed(arriving, [4, 4, 3])
    assert sent(log) == [0, 1, 2, 3, 4, 2], "layer 2 comes while layer 3 is computed with"
    passed(arriving, [2, 1, 0])
    assert sent(log) == [0, 1, 2, 3, 4, 2, 1, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_no_more_than_two_layers_are_there_at_once(count, log):
    arriving = layer_offload.arriving(layers(count), CPU)
    passed(arriving, [*range(count), *reversed(range(count))])
    assert log.most == min(count, 2) * 64 * 128 * 4
    del arriving
    gc.collect()
    assert not log.alive


def test_a_model_that_reads_one_document_after_another_begins_again(log):
    arriving = layer_offload.arriving(layers(4), CPU)
    passed(arriving, [0, 1, 2, 3, 0])
    assert sent(log)[4:] == [0, 1]


def test_what_was_never_waited_for_is_waited_for_before_its_memory_goes(log):
    """A backward pass that ends above the first layer leaves one on its way."""
    arriving = layer_offload.arriving(layers(4), CPU)
    passed(arriving, [0, 1, 2, 3, 2])
    assert ("wait", 5) not in log.events and sent(log)[-1] == 1
    del arriving
    gc.collect()
    waited, dropped = log.events.index(("wait", 5)), max(i for i, event in enumerate(log.events) if event == ("drop", 1))
    assert waited < dropped


def test_each_layer_is_waited_for_once(log):
    arriving = layer_offload.arriving(layers(3), CPU)
    passed(arriving, [0, 0, 0, 1, 1, 2])
    marks = [mark for name, mark in log.events if name == "wait"]
    assert marks == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_a_file_gives_back_what_was_put(dtype):
    numbers = torch.randn(200, 130, generator=torch.Generator().manual_seed(0)).mul(20).to(dtype)
    put = layer_offload.home("disk", CPU)
    for tensor in (numbers, numbers.T, numbers[3:, 5:]):
        kept = put(tensor)
        assert kept.dtype == dtype and torch.equal(kept.view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert put(kept) is kept, "what is there stays"


def test_the_file_has_no_name_and_goes_with_the_tensor():
    kept = layer_offload.home("disk", CPU)(torch.ones(1 << 20))
    assert not os.path.exists(kept.untyped_storage().filename)
    maps = f"/proc/{os.getpid()}/maps"
    if os.path.exists(maps):
        name = kept.untyped_storage().filename
        assert name in open(maps).read()
        del kept
        assert name not in open(maps).read()


def resident():
    """Bytes of mapped files of this process that are in memory."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssFile"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="what is in memory is read from /proc")
def test_pages_of_a_layer_go_when_the_pass_has_left_it():
    put, size = layer_offload.home("disk", CPU), 1 << 24
    every = [{"w": put(torch.full((size // 4,), float(index)))} for index in range(6)]
    before, most = resident(), 0
    arriving = layer_offload.arriving(every, CPU)
    for index in [*range(6), *reversed(range(6))]:
        assert shard.gather(arriving[index]["w"]).sum() == index * size // 4
        most = max(most, resident())
    assert most - before < 2.5 * size, "the layer, and the pages of the next one that the system has read ahead"
    assert all(layer["w"].min() == index == layer["w"].max() for index, layer in enumerate(every)), "and nothing is lost"


def test_a_tree_leaves_its_layers_and_keeps_the_rest():
    wide = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    params = {"embed_tokens": wide, "layers": [{"w": quant.quantise(wide, Scheme("int8")), "norm": torch.ones(8)}, {"w": wide}]}
    moved = layer_offload.away(params, layer_offload.home("disk", CPU))
    assert layer_offload.elsewhere(moved, CPU) == 64 * 256 + wide.nbytes and layer_offload.elsewhere(params, CPU) == 0
    assert moved["embed_tokens"] is wide and moved["layers"][0]["norm"] is params["layers"][0]["norm"]
    for (path, a), (_, b) in zip(tree.items(params), tree.items(moved), strict=True):
        assert torch.equal(shard.gather(a), shard.gather(b)), path


def test_a_model_whose_layers_are_there_is_left_alone():
    every = [{"w": torch.ones(64, 128)}]
    assert layer_offload.arriving(every, CPU) is every
    assert layer_offload.home("cpu", CPU) is None


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ValueError, match="layers are offloaded to cpu or disk, got 'tape'"):
        layer_offload.home("tape", CPU)
