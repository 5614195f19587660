"""Every option of a preference or reward method changes what a run computes, or is refused where the method would not look at it."""

import importlib.util
import math
from pathlib import Path

import pytest

from treetune.cli.methods import METHODS
from treetune.cli.methods import dpo as loss_options
from treetune.cli.methods.reward import Reward
from treetune.core.config import table
from treetune.models import reference

spec = importlib.util.spec_from_file_location("preference_runs", Path(__file__).with_name("test_preference.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
train = runs.train  # the fixture

FULL = ["--adapter", "none"]
PREFERENCES = {METHODS[name].config: name for name in ("dpo", "kto", "orpo", "simpo", "cpo", "reward", "prm")}
SYNC = [*FULL, "--sync-ref-model", "--max-steps", 3]
LOSSES = ("ipo", "hinge", "cdpo", "robust", "exo", "nca", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
          "discopop", "dpo_norm", "sft")  # fmt: skip
# (command, option) -> (the arguments that set it, arguments on both sides)
CHANGES = {
    ("dpo", "loss"): (["--loss", "ipo"], []),
    ("dpo", "loss_weights"): (["--loss-weights", 0.8, 0.3], ["--loss", "dpo", "sft"]),
    ("dpo", "rl_beta"): (["--rl-beta", 0.3], []),
    ("dpo", "dpo_label_smoothing"): (["--dpo-label-smoothing", 0.2], ["--loss", "cdpo"]),
    ("dpo", "f_divergence"): (["--f-divergence", "js"], []),
    ("dpo", "f_alpha_divergence_coef"): (["--f-alpha-divergence-coef", 0.2], ["--f-divergence", "alpha"]),
    ("dpo", "discopop_tau"): (["--discopop-tau", 0.5], ["--loss", "discopop"]),
    ("dpo", "ld_alpha"): (["--ld-alpha", 0.3], []),
    ("dpo", "dpo_use_weighting"): (["--dpo-use-weighting"], []),
    ("dpo", "rpo_alpha"): (["--rpo-alpha", 0.5], []),
    ("dpo", "router_aux_loss_coef"): (["--router-aux-loss-coef", 0.5], ["--model", "experts"]),
    ("dpo", "router_z_loss_coef"): (["--router-z-loss-coef", 0.5], ["--model", "experts"]),
    ("dpo", "ref_model"): (["--ref-model", "SAME"], []),
    ("dpo", "precompute_ref_logps"): (["--precompute-ref-logps"], []),
    ("dpo", "sync_ref_model"): (["--sync-ref-model", "--ref-model-sync-steps", 1], FULL),
    ("dpo", "ref_model_sync_steps"): (["--ref-model-sync-steps", 1], SYNC),
    ("dpo", "ref_model_mixup_alpha"): (["--ref-model-mixup-alpha", 0.2], [*SYNC, "--ref-model-sync-steps", 1]),
    ("kto", "loss"): (["--loss", "bco"], []),
    ("kto", "rl_beta"): (["--rl-beta", 0.3], []),
    ("kto", "kto_desirable_weight"): (["--kto-desirable-weight", 1.3], []),
    ("kto", "kto_undesirable_weight"): (["--kto-undesirable-weight", 1.3], []),
    ("kto", "ref_model"): (["--ref-model", "SAME"], []),
    ("kto", "precompute_ref_logps"): (["--precompute-ref-logps"], []),
    ("kto", "sync_ref_model"): (["--sync-ref-model", "--ref-model-sync-steps", 1], FULL),
    ("kto", "ref_model_sync_steps"): (["--ref-model-sync-steps", 1], SYNC),
    ("kto", "ref_model_mixup_alpha"): (["--ref-model-mixup-alpha", 0.2], [*SYNC, "--ref-model-sync-steps", 1]),
    ("orpo", "orpo_alpha"): (["--orpo-alpha", 0.5], []),
    ("orpo", "orpo_nll_scope"): (["--orpo-nll-scope", "completion"], []),
    ("simpo", "rl_beta"): (["--rl-beta", 3], []),
    ("simpo", "simpo_gamma"): (["--simpo-gamma", 1.5], []),
    ("simpo", "simpo_alpha"): (["--simpo-alpha", 0.2], []),
    ("simpo", "cpo_alpha"): (["--cpo-alpha", 0.5], []),
    ("cpo", "loss"): (["--loss", "hinge"], []),
    ("cpo", "rl_beta"): (["--rl-beta", 0.3], []),
    ("cpo", "cpo_alpha"): (["--cpo-alpha", 0.2], []),
    ("cpo", "dpo_label_smoothing"): (["--dpo-label-smoothing", 0.2], []),
    ("reward", "center_rewards_coefficient"): (["--center-rewards-coefficient", 0.5], []),
}
SAME_NUMBERS = {"precompute_ref_logps"}  # what it changes is how often the reference is computed


@pytest.fixture
def calls(monkeypatch):
    """The passes of a reference through its model."""
    seen, plain = [], reference.logprobs
    monkeypatch.setattr(reference, "logprobs", lambda *args, **kwargs: seen.append(1) or plain(*args, **kwargs))
    return seen


@pytest.fixture
def losses(kit, tiny, here, train):
    """losses(command, args, name) -> what the steps and evaluations of a run said."""

    def run(command, args, name):
        if "experts" in args and not (here / "experts").exists():
            kit.write_experts(here / "experts")
        done = train(command, *[tiny.same if arg == "SAME" else arg for arg in args], "--output-dir", name)
        assert done.code == 0, done.err
        return kit.timeless(kit.metrics(here / name))

    return run


def joined(base: list, more: list) -> list:
    """Arguments in which those of `more` replace those of `base`."""
    known = {arg for arg in more if str(arg).startswith("--")}
    kept, keep = [], True
    for arg in base:
        keep = arg not in known if str(arg).startswith("--") else keep
        kept += [arg] if keep else []
    return kept + more


@pytest.fixture(scope="module")
def plain_runs():
    """{(command, arguments): what a run with them said, passes of its reference}: many options are compared with the same one."""
    return {}


# What kto shares with dpo, and what dpo shares with sft.
SHARED = {
    ("kto", name) for name in ("ref_model", "precompute_ref_logps", "sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")
}
SHARED |= {("dpo", "router_z_loss_coef"), ("cpo", "dpo_label_smoothing")}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("command", "option"), [pytest.param(*case, marks=pytest.mark.slow) if case in SHARED else case for case in CHANGES]
)
def test_option_changes_the_run(command, option, plain_runs, losses, calls):
    own, both = CHANGES[command, option]
    both = [*both, "--val-set-size", 0]
    key = (command, *map(str, both))
    if key not in plain_runs:
        plain_runs[key] = losses(command, both, "plain"), len(calls)
    plain, passes = plain_runs[key]
    calls.clear()
    changed = losses(command, joined(both, own), "changed")
    if option in SAME_NUMBERS:
        assert 0 < len(calls) != passes
    else:
        trained = [[record["train/loss"] for record in told if "train/loss" in record] for told in (plain, changed)]
        assert trained[0] != trained[1], "the numbers of training, not only what is printed"


def test_terms_on_routers_are_added_to_the_loss_of_pairs(losses):
    args = ["--model", "experts", "--router-aux-loss-coef", 0.5, "--router-z-loss-coef", 0.25]
    first = next(record for record in losses("dpo", args, "run") if "train/loss" in record)
    assert first["router_aux_loss"] > 2 and first["router_z_loss"] > 0, "2 experts a token, all used alike"
    whole = math.log(2) + 0.5 * first["router_aux_loss"] + 0.25 * first["router_z_loss"]
    assert first["train/loss"] == pytest.approx(whole, rel=1e-6)
    told = [record for record in losses("dpo", args, "again") if "eval/loss" in record]
    assert told and "router_aux_loss" not in told[0] and told[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("command", ["dpo", "kto"])
def test_a_reference_that_is_computed_once_is_not_computed_again(command, losses, calls):
    counts = []
    for steps in (2, 6):
        calls.clear()
        losses(command, ["--precompute-ref-logps", "--max-steps", steps], f"run{steps}")
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_there_is_a_row_for_every_option_of_a_loss_and_of_a_reference():
    expected = set()
    for config, command in PREFERENCES.items():
        for group in ("loss", "reference"):
            expected |= {(command, option) for option in vars(getattr(config(), group, object)) if not option.startswith("_")}
    assert set(CHANGES) == expected


def test_every_loss_of_the_documents_is_one_of_the_choices():
    """By its own name and by those of other tools, and each trains."""
    choices = set(loss_options.LOSS_NAMES)
    assert choices == {"dpo", *LOSSES, "sigmoid", "exo_pair", "nca_pair", "sigmoid_norm"}
    assert set(loss_options.ALIASES) >= choices - {"dpo", *LOSSES}


def test_every_pair_loss_and_divergence_trains_by_its_own_numbers(losses):
    """From a policy that differs from its reference, so that no two agree by chance."""
    args, smooth = ["--ref-model", "SAME", "--rl-beta", 0.3, "--max-steps", 1], ["--dpo-label-smoothing", 0.1]
    own = {"sft": ["--max-steps", 1], "cdpo": [*args, *smooth], "robust": [*args, *smooth]}
    cases = {loss: [*own.get(loss, args), "--loss", loss] for loss in ("dpo", *LOSSES)}
    cases |= {name: [*args, "--f-divergence", name] for name in ("forward_kl", "js", "alpha")}
    told = {name: losses("dpo", found, name)[1]["train/loss"] for name, found in cases.items()}
    assert all(math.isfinite(value) for value in told.values())
    # sorted in a stream of few pairs, transport of margins is often their own order
    alike = {name for name, value in told.items() if list(told.values()).count(value) > 1}
    assert alike <= {"dpo", "aot", "aot_unpaired"}, told


ALIASES = [(["--loss", "sigmoid"], ["--loss", "dpo"]), (["--loss", "exo_pair"], ["--loss", "exo"]),
           (["--loss", "nca_pair"], ["--loss", "nca"]), (["--loss", "sigmoid_norm"], ["--loss", "dpo_norm"]),
           (["--f-divergence", "js_divergence"], ["--f-divergence", "js"]),
           (["--f-divergence", "alpha_divergence"], ["--f-divergence", "alpha"])]  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "ours"), [ALIASES[0], ALIASES[4], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ALIASES[1:4] + ALIASES[5:])]
)
def test_names_of_other_tools_mean_the_same(theirs, ours, losses):
    assert losses("dpo", theirs, "a") == losses("dpo", ours, "b")


SMOOTHED, DIVERGING = {"cdpo", "robust", "exo", "aot", "aot_unpaired"}, {
    "dpo", "cdpo", "ipo", "hinge", "exo", "robust", "discopop", "dpo_norm"
}  # fmt: skip
IGNORED = {
    **{f"{loss} and smoothing": ("dpo", ["--loss", loss, "--dpo-label-smoothing", 0.1], "dpo-label-smoothing would be ignored")
       for loss in ("dpo", *LOSSES) if loss not in SMOOTHED},
    **{f"{loss} and a divergence": ("dpo", ["--loss", loss, "--f-divergence", "js"], "f-divergence would be ignored")
       for loss in ("dpo", *LOSSES) if loss not in DIVERGING},
    **{f"{loss} and a temperature": ("dpo", ["--loss", loss, "--discopop-tau", 0.1], "discopop-tau would be ignored")
       for loss in ("dpo", *LOSSES) if loss != "discopop"},
    **{f"{command} and a {flag}": (command, [flag, 2], "would be ignored") for command in ("dpo", "kto")
       for flag in ("--ref-model-sync-steps", "--ref-model-mixup-alpha") if flag != "--ref-model-mixup-alpha"},
    "mixup without sync": ("kto", ["--ref-model-mixup-alpha", 0.5], "would be ignored", "sync_ref_model is off"),
    "order of another divergence": ("dpo", ["--f-divergence", "js", "--f-alpha-divergence-coef", 0.3], "would be ignored", "js"),
    "beta of sft": ("dpo", ["--loss", "sft", "--rl-beta", 0.3], "rl-beta would be ignored", "sft"),
    "length weight of sft": ("dpo", ["--loss", "sft", "--ld-alpha", 0.3], "ld-alpha would be ignored"),
    "pair weight of sft": ("dpo", ["--loss", "sft", "--dpo-use-weighting"], "dpo-use-weighting would be ignored"),
    "no smoothing of exo": ("dpo", ["--loss", "exo", "--dpo-label-smoothing", 0], "would be ignored", "above 0"),
    "class weights of bco": ("kto", ["--loss", "bco", "--kto-desirable-weight", 2], "would be ignored", "bco"),
    "other class weight of bco": ("kto", ["--loss", "bco", "--kto-undesirable-weight", 2], "would be ignored", "bco"),
    "smoothing of a hinge": ("cpo", ["--loss", "hinge", "--dpo-label-smoothing", 0.1], "would be ignored", "hinge"),
    "smoothing of cpo's ipo": ("cpo", ["--loss", "ipo", "--dpo-label-smoothing", 0.1], "would be ignored", "ipo"),
    "answers of a reward model": ("reward", ["--sample-tokens", 3], "would be ignored", "writes no answers"),
    "answers of a step judge": ("prm", ["--sample-tokens", 3], "would be ignored", "writes no answers"),
}  # fmt: skip
CONTRADICTING = {
    "once and moving": ("dpo", ["--sync-ref-model", "--precompute-ref-logps", *FULL], "not both"),
    "another and moving": ("kto", ["--sync-ref-model", "--ref-model", "SAME", *FULL], "not both"),
    "mean of adapters": ("dpo", ["--sync-ref-model"], "mixup_alpha 1", "--adapter none"),
    "weighted aot": ("dpo", ["--loss", "aot", "--dpo-use-weighting"], "aot"),
    "losses without weights": ("dpo", ["--loss", "dpo", "sft", "--loss-weights", 1], "1 numbers for 2 losses"),
    "weights without losses": ("dpo", ["--loss-weights", 1, 2], "2 numbers for 1 losses"),
    "weight 0": ("dpo", ["--loss", "dpo", "sft", "--loss-weights", 1, 0], "numbers above 0, got 0"),
    "weight 0 of sft alone": ("dpo", ["--loss", "sft", "--loss-weights", 0], "numbers above 0, got 0"),
    "weight below 0": ("dpo", ["--loss", "dpo", "sft", "--loss-weights", -1, 1], "numbers above 0, got -1"),
    "weight nan": ("dpo", ["--loss-weights", "nan"], "numbers above 0, got nan"),
    "loss twice": ("dpo", ["--loss", "dpo", "sigmoid"], "each once"),
    "no loss": ("dpo", ["--loss"], "one or more losses"),
    "unknown loss": ("dpo", ["--loss", "dpoo"], "dpoo", "hinge"),
    "beta 0": ("dpo", ["--rl-beta", 0], "rl_beta must be a number above 0"),
    "smoothing of a half": ("dpo", ["--loss", "cdpo", "--dpo-label-smoothing", 0.5], "below 0.5"),
    "smoothing of a half, cpo": ("cpo", ["--dpo-label-smoothing", 0.5], "below 0.5"),
    "length weight above 1": ("dpo", ["--ld-alpha", 1.5], "ld_alpha must be a number from 0 to 1"),
    "weight of a class": ("kto", ["--kto-desirable-weight", 0], "kto_desirable_weight must be a number above 0"),
    "odds": ("orpo", ["--orpo-alpha", -1], "orpo_alpha must be a number from 0 up"),
    "margin": ("simpo", ["--simpo-gamma", "nan"], "simpo_gamma must be a number from 0 up"),
    "option of another command": ("simpo", ["--precompute-ref-logps"], "unknown option --precompute-ref-logps"),
    "head that nothing reads": ("reward", ["--lora-target-modules", "lm_head"], "no score depends on lm_head"),
    "missing reference": ("dpo", ["--ref-model", "nowhere"], "nowhere is not a folder"),
}


@pytest.mark.parametrize("what", IGNORED | CONTRADICTING)
def test_options_that_cannot_be_are_one_line(what, kit, tiny, here, train):
    command, args, *words = (IGNORED | CONTRADICTING)[what]
    kit.refused(train(command, *[tiny.same if arg == "SAME" else arg for arg in args]), *words)
    assert not (here / "run").exists()


def test_a_reference_of_another_vocabulary_is_refused(kit, tiny, here, train):
    other = kit.write_model(here / "wide", vocab_size=300)
    kit.refused(train("dpo", "--ref-model", other), "has 300 rows of vocabulary, the model 260", "one of its kind")


def test_a_reference_that_numbers_tokens_otherwise_is_refused(kit, here, train):
    """As many rows, but its log-probs would be of other texts."""
    other = kit.write_model(here / "turned") / "tokenizer.json"
    text = other.read_text()
    ids = kit.tokenizer().get_vocab()
    assert f'"a":{ids["a"]},' in "".join(text.split()) and ids["b"] == ids["a"] + 1
    turned = (
        text.replace(f'"a": {ids["a"]},', '"a": SWAP,').replace(f'"b": {ids["b"]},', f'"b": {ids["a"]},').replace("SWAP", str(ids["b"]))
    )
    other.write_text(turned)
    kit.refused(train("dpo", "--ref-model", other.parent), "token '[ab]' is", "one of its kind")


def test_options_of_peers_have_the_documented_defaults():
    flat = {command: table.flatten(config()) for config, command in PREFERENCES.items()}
    expected = {
        "dpo": {"rl_beta": 0.1, "loss": ["dpo"], "ref_model_sync_steps": 512, "ref_model_mixup_alpha": 0.6, "f_alpha_divergence_coef": 0.5,
                "discopop_tau": 0.05, "dpo_label_smoothing": 0.0, "ld_alpha": None, "rpo_alpha": None},
        "kto": {"rl_beta": 0.1, "kto_desirable_weight": 1.0, "kto_undesirable_weight": 1.0},
        "orpo": {"orpo_alpha": 0.1, "orpo_nll_scope": "full"},
        "simpo": {"simpo_gamma": 0.5, "cpo_alpha": 0.0, "simpo_alpha": 0.0},
        "cpo": {"rl_beta": 0.1, "cpo_alpha": 1.0, "dpo_label_smoothing": 0.0},
        "reward": {"center_rewards_coefficient": 0.0},
    }  # fmt: skip
    for command, values in expected.items():
        assert {name: flat[command][name] for name in values} == values
    assert Reward in PREFERENCES
