"""Options of choices that were flags once, or are such in other tools: on, off, true and false are read beside the choices."""

import pytest

from treetune.cli import parse
from treetune.cli.fit import configure
from treetune.cli.methods.sft import Sft

FORMS = {
    ("--gradient-checkpointing",): "full", ("--no-gradient-checkpointing",): "none", ("--gradient-checkpointing=true",): "full",
    ("--gradient-checkpointing", "false"): "none", ("--gradient-checkpointing", "selective"): "selective",
    ("--gradient-checkpointing=offload",): "offload", ("--gradient-checkpointing", "--seed", "3"): "full", (): "none",
}  # fmt: skip


@pytest.mark.parametrize("args", FORMS)
def test_the_command_line_takes_both_forms(args):
    config, given = parse.parse("sft", Sft, list(args))
    assert config.optim.gradient_checkpointing == FORMS[args]
    assert ("gradient_checkpointing" in given) == bool(args)


@pytest.mark.parametrize(("text", "value"), [("true", "full"), ("false", "none"), ("selective", "selective"), ("offload", "offload")])
def test_a_file_takes_both_forms(text, value, tmp_path):
    (tmp_path / "run.yaml").write_text(f"gradient_checkpointing: {text}\nactivation_offloading: {str(text == 'true').lower()}\n")
    config, _ = parse.parse("sft", Sft, ["--config", str(tmp_path / "run.yaml")])
    assert config.optim.gradient_checkpointing == value
    assert config.optim.activation_offloading == ("cpu" if text == "true" else "none")


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({}, None),
        ({"gradient_checkpointing": True}, "full"),
        ({"gradient_checkpointing": "selective"}, "selective"),
        ({"gradient_checkpointing": "offload"}, "full+cpu"),
        ({"gradient_checkpointing": "offload", "activation_offloading": "disk"}, "full+disk"),
        ({"activation_offloading": True}, "none+cpu"),
        ({"gradient_checkpointing": "selective", "activation_offloading": "disk"}, "selective+disk"),
    ],
)
def test_options_become_a_policy(options, policy):
    assert configure("sft", **options).optim.remat == policy


@pytest.mark.parametrize(
    "args",
    [
        ["--gradient-checkpointing", "half"],
        ["--no-gradient-checkpointing=full"],
        ["--gradient-checkpointing=full", "--gradient-checkpointing"],
    ],
)
def test_other_forms_are_refused(args):
    with pytest.raises(ValueError, match="gradient-checkpointing"):
        parse.parse("sft", Sft, args)
