"""Configs from Python values: read as a file of them would be, or refused with the name of the option."""

import dataclasses
import enum
from pathlib import Path

import numpy as np
import pytest
import torch

from treetune.cli.methods import METHODS
from treetune.cli.methods.dpo import Dpo
from treetune.cli.methods.sft import Sft
from treetune.cli.options.model import AdapterOptions, ModelOptions
from treetune.core.config import reading, table


class Rank(enum.IntEnum):
    SMALL = 4


def test_numbers_of_other_libraries_and_paths_are_read():
    values = {
        "max_steps": np.int64(3),
        "learning_rate": np.float64(1e-3),
        "lora_r": Rank.SMALL,
        "seed": torch.tensor(7),
        "model": Path("m"),
    }
    flat = table.flatten(reading.from_values("sft", Sft, values))
    assert [flat[name] for name in values] == [3, 1e-3, 4, 7, "m"]
    assert [type(flat[name]) for name in values] == [int, float, int, int, str]
    reading.to_yaml(reading.from_values("sft", Sft, values))


CYCLE: list = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": {"a.jsonl"}}, "sft: data is of type set; expected a number, a text, a path, or a list or mapping of such"),
        ({"max_steps": object()}, "sft: max_steps is of type object"),
        ({"model": b"m"}, "sft: model is of type bytes"),
        ({"data": np.array(["a", "b"])}, "sft: data is of type ndarray"),
        ({"special_tokens": {1: "x"}}, "sft: special_tokens is a mapping with the key 1; keys must be texts"),
        ({"datasets": [{1: "x"}]}, "sft: datasets is a mapping with the key 1"),
        ({"data": CYCLE}, "sft: data holds lists or mappings more than 20 deep"),
        ({"max_steps": np.bool_(True)}, "max_steps must be a whole number"),
    ],
)
def test_what_no_file_can_hold_is_refused_with_the_option(values, words):
    with pytest.raises(ValueError) as error:
        reading.from_values("sft", Sft, values)
    assert words in str(error.value)


def test_a_config_put_together_in_python_is_read_as_a_file():
    config = Sft(data=dataclasses.replace(Sft().data, data=["a.jsonl"], sequence_len=np.int64(64)))
    again = reading.reread("sft", config)
    assert again.data.data == ("a.jsonl",) and type(again.data.sequence_len) is int
    assert reading.reread("dpo", Dpo()) == Dpo() and reading.reread("sft", again) == again
    one = dataclasses.replace(Sft().data, data="rows.jsonl")
    assert reading.reread("sft", Sft(data=one)).data.data == ("rows.jsonl",), "a text is one file, not its letters"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Sft(adapter=AdapterOptions(adapter="lorra")), "sft: adapter must be one of lora, qlora, none"),
        (Sft(model=ModelOptions(dtype="fp16")), "sft: dtype must be one of auto"),
        (Sft(optim=dataclasses.replace(Sft().optim, max_steps=True)), "sft: max_steps must be a whole number"),
        (Sft(run=dataclasses.replace(Sft().run, eval_steps="many")), "sft: eval_steps must be a whole number"),
        (Sft(adapter=None), "sft: adapter must be AdapterOptions(...), got None"),
        (Sft(model="m"), "sft: model must be"),
    ],
)
def test_a_wrong_config_put_together_in_python_is_refused(config, words):
    with pytest.raises(ValueError) as error:
        reading.reread("sft", config)
    assert words in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_of_a_method_are_read_as_they_are(name):
    config = METHODS[name].config()
    assert reading.reread(name, config) == config
