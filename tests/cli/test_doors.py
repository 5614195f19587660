"""Functions of the user's own as losses, advantages, optimizers and schedules: named by import path, checked before anything is loaded."""

import re
from pathlib import Path

import pytest

from treetune.cli import main
from treetune.cli.options import policy_loss
from treetune.core import import_path
from treetune.core.config import table
from treetune.losses import policy_gradient

FUNCTIONS = '''"""Functions of a user."""
import functools

import torch

from treetune.core import optim
from treetune.losses import kto, policy, preference, reference_free, sft


def likelihood(logp):
    return sft.nll(logp)


def focal(logp, *, gamma=2.0):
    return -((1 - logp.exp()) ** gamma) * logp


def shaped(logp, entropy, gamma):
    return -logp * entropy ** gamma


def hungry(logits):
    return logits


def pair(pairs, *, beta):
    return preference.hinge(pairs, beta=beta)


def judged(logp, ref_logp, desirable, baseline, *, beta, desirable_weight):
    return kto.kto(logp, ref_logp, desirable, baseline, beta=beta, desirable_weight=desirable_weight)


def free(pairs, *, beta):
    return reference_free.cpo_hinge(pairs, beta=beta)


def term(ratio, advantage, *, epsilon, slope=1.0):
    return slope * policy.ppo_clip(ratio, advantage, epsilon=epsilon)


def ranks(rewards):
    return rewards.argsort(-1).argsort(-1).float() - (rewards.shape[-1] - 1) / 2


def plain_sgd(*, weight_decay, lr_scale):
    return optim.sgd(weight_decay=weight_decay, lr_scale=lr_scale)


def steps_down(peak, steps, *, times=2):
    return lambda step: peak * 0.1 ** (step * times // steps)


half = functools.partial(focal, gamma=0.5)
'''


@pytest.fixture
def own(here) -> Path:
    """A file of functions in the working folder."""
    (here / "own.py").write_text(FUNCTIONS)
    return here / "own.py"


def test_signature_is_read_without_importing(own):
    own.write_text(FUNCTIONS + "\nraise RuntimeError('imported')\n")
    assert import_path.signature("own.py:shaped") == (("logp", "entropy", "gamma"), ("logp", "entropy", "gamma"), False)
    assert import_path.signature("own.py:half") is None  # assigned: only importing tells
    assert import_path.signature("own:focal") == import_path.signature("own.focal") == (("logp", "gamma"), ("logp",), False)
    assert import_path.signature("treetune.losses.sft.eaft").required == ("logp", "topk_entropy")


BAD = {
    "no file": (["sft", "--loss", "nope.py:focal"], "loss nope.py:focal: there is no file nope.py"),
    "no module": (["sft", "--loss", "nope.focal"], "loss nope.focal: there is no module nope"),
    "no function": (["sft", "--loss", "own.py:focl"], "own.py has no function focl; its functions are likelihood, focal"),
    "unknown option": (["sft", "--loss", "own.py:focal?gama=2"], "focal has no option gama; its options are gamma"),
    "no value": (["sft", "--loss", "own.py:focal?gamma"], "the option 'gamma' of own.py:focal is not name=value"),
    "needs what is not there": (["sft", "--loss", "own.py:hungry"], "hungry takes logits, but the token loss is called with logp, entropy"),
    "needs an option": (["sft", "--loss", "own.py:shaped"], "shaped takes gamma, but the token loss is called with"),
    "what it is called with": (["sft", "--loss", "own.py:focal?logp=1"], "logp is what the function is called with"),
    "does not parse": (["sft", "--loss", "broken.py:focal"], "broken.py does not load"),
    "neither name nor path": (["sft", "--loss", "nlll"], "--loss must be one of nll, dft, eaft, or FILE.py:FUNCTION, got 'nlll'"),
    "neither, in a file": (["sft", "--config", "c.yaml"], "loss must be one of nll, dft, eaft, or FILE.py:FUNCTION, got .nlll"),
    "smoothing": (
        ["sft", "--loss", "own.py:focal", "--label-smoothing", "0.1"],
        "label-smoothing would be ignored: the loss is own.py:focal",
    ),
    "betas": (["sft", "--optimizer", "own.py:plain_sgd", "--adam-beta1", "0.5"], "own.py:plain_sgd takes no b1"),
    "no decay rules": (["sft", "--optimizer", "own.py:plain_sgd", "--weight-decay-rules", "a=1"], "own.py:plain_sgd takes no decay"),
    "cosine": (["sft", "--lr-scheduler", "own.py:steps_down", "--cosine-min-lr-ratio", "0.1"], "the schedule is own.py:steps_down"),
    "pair loss": (["dpo", "--loss", "dpo", "own.py:pair?margin=1"], "loss own.py:pair.margin=1: pair has no option margin"),
    "unsmoothed": (["dpo", "--loss", "own.py:pair", "--dpo-label-smoothing", "0.1"], "own.py:pair takes no label smoothing"),
    "unclipped": (["grpo", "--loss", "own.py:term", "--delta", "2"], "own.py:term takes no delta"),
    "advantage": (["grpo", "--advantage", "own.py:focal"], "focal takes logp, but the advantage is called with rewards, weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_function_is_one_line_before_anything_is_loaded(case, own, tune, kit):
    (own.parent / "broken.py").write_text("def focal(:\n")
    (own.parent / "c.yaml").write_text("loss: nlll\n")
    args, words = BAD[case]
    kit.refused(tune(*args), words)
    assert not (own.parent / "runs").exists()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "args",
    [
        ["--loss", "own.py:focal"],
        ["--loss", "own.py:focal?gamma=0.5"],
        ["--loss", "own.py:shaped?gamma=0.5"],
        ["--loss", "own.py:half"],
        ["--optimizer", "own.py:plain_sgd"],
        ["--lr-scheduler", "own.py:steps_down?times=4"],
    ],
    ids=" ".join,
)
def test_own_function_changes_the_run_and_stands_in_its_config(args, own, sft, finished, kit):
    common = ["--learning-rate", 0.05, "--sample-prompt=", "--max-steps", 3]
    plain = finished("sft", *common)
    done = sft(*common, *args, "--output-dir", "changed")
    assert done.code == 0, done.err
    assert kit.timeless(kit.metrics(plain)) != kit.timeless(kit.metrics(own.parent / "changed"))
    assert f"{args[0][2:].replace('-', '_')}: {args[1]}" in (own.parent / "changed" / "config.yaml").read_text()


def test_the_likelihood_as_own_function_is_the_likelihood(own, sft, kit):
    assert sft("--output-dir", "plain", "--sample-prompt=").code == 0
    assert sft("--loss", "own.py:likelihood", "--output-dir", "own", "--sample-prompt=").code == 0
    assert kit.timeless(kit.metrics(own.parent / "plain")) == kit.timeless(kit.metrics(own.parent / "own"))


def test_resuming_takes_the_same_function_from_elsewhere_and_lists_an_edit(own, sft, kit):
    assert sft("--loss", "own.py:focal", "--output-dir", "r", "--sample-prompt=").code == 0
    (own.parent / "moved.py").write_text(FUNCTIONS)
    (own.parent / "other.py").write_text(FUNCTIONS.replace("gamma=2.0", "gamma=3.0"))
    more = ["--output-dir", "r", "--resume", "auto", "--sample-prompt="]
    kit.refused(sft(*more, "--loss", "other.py:focal", "--max-steps", 4), "loss other.py:focal instead of own.py:focal")
    kit.refused(sft(*more, "--loss", "nll", "--max-steps", 4), "loss nll instead of own.py:focal")
    done = sft(*more, "--loss", "moved.py:focal", "--max-steps", 4)
    assert done.code == 0 and re.search(r"loss own.py:focal -> moved.py:focal", done.out), done.out + done.err
    (own.parent / "moved.py").write_text(FUNCTIONS + "# edited\n")
    done = sft(*more, "--loss", "moved.py:focal", "--max-steps", 5)
    assert done.code == 0 and "moved.py:focal: the file of this function changed" in done.out


PAIRS = [{"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i + 3}"} for i in range(12)]
ONLINE = ["--reward-funcs", "digits", "--num-generations", 4, "--max-completion-length", 6, "--learning-rate", 0.1]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "command, plain, changed",
    [
        ("dpo", ["--loss", "hinge"], ["--loss", "own.py:pair"]),
        ("cpo", ["--loss", "hinge"], ["--loss", "own.py:free"]),
        ("kto", [], ["--loss", "own.py:judged"]),
        ("dpo", ["--loss", "hinge", "ipo"], ["--loss", "own.py:pair", "ipo"]),
        pytest.param("grpo", [*ONLINE, "--loss", "bnpo"], [*ONLINE, "--loss", "own.py:term"], marks=pytest.mark.slow),
        ("grpo", ONLINE, [*ONLINE, "--advantage", "own.py:ranks"]),
        ("grpo", ONLINE, [*ONLINE, "--loss", "own.py:term?slope=3", "--epsilon", 0.5]),
    ],
)
def test_own_function_of_a_method(command, plain, changed, own, tune, kit, tiny):
    """A function that does what a built-in one does gives the same numbers, and another one others."""
    judged = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)]
    kit.write_rows(own.parent / "rows.jsonl", judged if command == "kto" else PAIRS)
    common = ["--model", tiny.model, "--data", "rows.jsonl", "--lora-r", 4, "--max-steps", 2, "--sample-prompt=", "--micro-batch-size", 2]
    common += [] if command == "grpo" else ["--sequence-len", 64]
    for name, args in (("plain", plain), ("changed", changed)):
        done = tune(command, *common, *args, "--output-dir", name)
        assert done.code == 0, done.err
    one, other = (kit.timeless(kit.metrics(own.parent / name)) for name in ("plain", "changed"))
    same = command != "grpo" or "own.py:term" in changed
    one, other = ([kept(record) for record in records] for records in (one, other))
    assert (one == other) == same


def kept(record: dict) -> dict:
    """A record without what only a built-in term reports, and without the clock."""
    return {name: value for name, value in record.items() if "clip" not in name and "seconds" not in name}


WATCH = """
class Watch:
    def __init__(self, file="seen.txt"):
        self.file = file

    def step(self, record):
        with open(self.file, "a") as out:
            print(record["step"], file=out)


def fail(event, record):
    raise OSError("no network")
"""


def test_observer_is_told_of_the_run_and_cannot_end_it(here, sft, kit):
    (here / "watch.py").write_text(WATCH)
    kit.refused(sft("--observer", "watch.py:Watch?fil=x"), "Watch has no option fil; its options are file")
    kit.refused(sft("--observer", "watch"), "observer must be FILE.py:FUNCTION, got 'watch'")
    done = sft("--observer", "watch.py:Watch", "watch.py:Watch?file=other.txt", "watch.py:fail", "--sample-prompt=")
    assert done.code == 0
    assert "observer watch.py:fail failed at start (OSError: no network); the run goes on without it" in done.out + done.err
    assert (here / "seen.txt").read_text() == (here / "other.txt").read_text() == "1\n2\n"


def test_a_run_is_not_overwritten_with_a_function_inside(own, sft, kit):
    assert sft("--output-dir", "r", "--sample-prompt=").code == 0
    own.rename(own.parent / "r" / "own.py")
    kit.refused(sft("--loss", "r/own.py:focal", "--output-dir", "r", "--overwrite"), "which the run reads .--loss.")


def test_names_of_what_a_policy_term_is_given_are_those_of_the_objective():
    assert policy_loss.GIVEN == policy_gradient.Tokens._fields


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_choice_of_an_option_with_functions_is_in_its_help(command):
    for option in table.options(main.COMMANDS[command].config).values():
        if option.door is not None:
            assert option.choices == option.door.names and option.door.metavar.endswith(import_path.FORM)
