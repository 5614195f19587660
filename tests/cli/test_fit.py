"""Runs from Python: the numbers of the command line, observers, threads, sources of one's own, and errors that can be caught."""

import dataclasses
import re
import threading

import pytest
import torch
from safetensors.torch import load_file

from treetune.cli import fit, methods
from treetune.cli.fit import configure
from treetune.core import tree
from treetune.core.run.errors import RunFailed
from treetune.core.run.source import Fixed
from treetune.models import policy

OPTIONS = {"sequence_len": 128, "lora_r": 4, "sample_prompt": "", "max_steps": 3}


def options(tiny, **more):
    return {"model": tiny.model, "data": [tiny.chat]} | OPTIONS | more


def test_a_config_is_read_as_a_file_of_it_is(tiny):
    config = configure("sft", **options(tiny, learning_rate=1e-3, lora_target_modules=["q_proj"], warmup_steps=2))
    assert (config.optim.learning_rate, config.adapter.lora_target_modules, config.optim.warmup_steps) == (1e-3, ("q_proj",), 2)
    assert config.model.model == str(tiny.model)


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        (["sft"], {}, "unknown method ['sft']; expected one of sft"),
        ("sfr", {}, "unknown method 'sfr'; expected one of sft, pretrain, dpo"),
        ("sft", {"learning_rat": 1}, "'learning_rat' (did you mean learning_rate?)"),
        ("sft", {"max_steps": "many"}, "max_steps must be a whole number"),
    ],
)
def test_a_wrong_config_is_a_value_error(method, values, words):
    with pytest.raises(ValueError) as error:
        configure(method, **values)
    assert words in str(error.value)


def test_bad_input_is_a_value_error_and_writes_nothing(tiny, here, kit):
    cases = [({"momentum": 0.9}, "--momentum would be ignored"), ({"data": ["none.jsonl"]}, "none.jsonl"), ({"epsilon": 1}, "epsilon")]
    for more, words in cases:
        with pytest.raises(ValueError, match=words):
            fit.fit(configure("sft", **options(tiny, **more)))
    assert kit.listing(here) == set()


def test_the_average_of_a_schedule_free_run_is_what_is_evaluated_and_saved(tiny, here):
    more = {"optimizer": "schedule_free_adamw", "lr_scheduler": "constant", "learning_rate": 0.01, "val_set_size": 2}
    result = fit.fit(configure("sft", **options(tiny, **more)))
    pairs = zip(tree.leaves(result.state.params), tree.leaves(result.state.opt["z"]), tree.leaves(result.policy.params), strict=True)
    assert all(torch.equal(shown, torch.lerp(y, z, 1 - 1 / 0.9)) for y, z, shown in pairs)
    saved = {name.rpartition("layers.")[2]: leaf for name, leaf in load_file(result.folder / "adapter/adapter_model.safetensors").items()}
    for path, leaf in tree.items(result.policy.params["lora"]["layers"][0]["q_proj"]):
        assert torch.equal(saved[f"0.self_attn.q_proj.lora_{path}.weight"], leaf)
    # The last evaluation is that of a run that starts from what was saved.
    start = {"lora_model_dir": str(result.folder / "adapter"), "val_set_size": 2, "max_steps": 1, "learning_rate": 1e-12}
    again = fit.fit(configure("sft", **{name: value for name, value in options(tiny, **start).items() if name != "lora_r"}))
    first, last = ([one["eval/loss"] for one in run.history if "eval/loss" in one] for run in (again, result))
    assert first[0] == pytest.approx(last[-1], rel=1e-5)


def test_a_run_that_fails_is_run_failed(tiny, here):
    with pytest.raises(RunFailed, match="train/loss was above 0.0001"):
        fit.fit(configure("sft", **options(tiny, loss_watchdog_threshold=1e-4, loss_watchdog_patience=1)))


def test_a_run_in_a_thread_prints_nothing_and_gives_the_numbers_of_the_command_line(tiny, here, kit, tune, capsys):
    assert tune("sft", *kit.basics(tiny, "--sample-prompt=", "--max-steps", 3, "--output-dir", "command")).code == 0
    results = []
    config = configure("sft", **options(tiny, output_dir="thread"))
    thread = threading.Thread(target=lambda: results.append(fit.fit(config)))
    thread.start()
    thread.join()
    assert capsys.readouterr().out == ""
    one, other = (kit.left(here / name, 3) for name in ("command", "thread"))
    assert kit.same(one[0], other[0]) and kit.same(one[1], other[1]) and one[2] == other[2]
    (result,) = results
    assert kit.timeless(result.history) == kit.timeless(kit.metrics(here / "thread")) and result.folder.name == "thread"


def test_the_policy_of_a_run_samples_saves_and_trains_on(tiny, here, kit):
    first = fit.fit(configure("sft", **options(tiny, output_dir="first")))
    policy.save(first.policy, here / "copy")
    assert kit.same(kit.tensors(here / "copy/adapter_model.safetensors"), kit.tensors(here / "first/adapter/adapter_model.safetensors"))
    more = {"lora_model_dir": "first", "output_dir": "second"}
    second = fit.fit(configure("sft", **{name: value for name, value in options(tiny, **more).items() if name != "lora_r"}))
    assert int(second.state.step) == 3


def test_observers_are_told_and_one_that_fails_does_not_end_the_run(tiny, here):
    events = []

    def track(event, record):
        events.append(event)
        if event == "step" and record["step"] == 2:
            raise ConnectionError("gone")

    class Losses:
        def __init__(self):
            self.values = []

        def step(self, record):
            self.values.append(record["train/loss"])

    losses = Losses()
    result = fit.fit(configure("sft", **options(tiny)), observers=[track, losses])
    assert events == ["start", "evaluation", "step", "step"], "it is left out once it has failed"
    assert losses.values == [record["train/loss"] for record in result.history if "train/loss" in record] and len(losses.values) == 3


def test_an_observer_that_fails_is_told_to_logging_where_nobody_takes_lines(tiny, here, caplog):
    def track(event, record):
        raise ConnectionError("gone")

    class Lines:
        def message(self, text, *, warning=False):
            lines.append(text)

    lines = []
    fit.fit(configure("sft", **options(tiny, max_steps=1)), observers=[track])
    said = [record.getMessage() for record in caplog.records if record.name == "treetune"]
    assert [text for text in said if text.startswith("observer track failed at start (ConnectionError: gone)")]
    caplog.clear()
    fit.fit(configure("sft", **options(tiny, max_steps=1)), observers=[track, Lines()])
    assert not [record for record in caplog.records if record.name == "treetune"]
    assert [text for text in lines if text.startswith("observer track failed at start")]


def test_a_config_that_is_put_together_by_hand_is_checked_as_a_file(tiny, here, kit):
    config = configure("sft", **options(tiny))
    optim = dataclasses.replace(config.optim, learning_rate="fast")
    for wrong, words in [
        (dataclasses.replace(config, optim=optim), 'sft: learning_rate must be a number above 0, at most 3e+38, got "fast"'),
        (dataclasses.replace(config, optim={"max_steps": 3}), "sft: optim must be OptimOptions"),
        ({"model": "x"}, "dict is no config of a method"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            fit.fit(wrong)
    assert kit.listing(here) == set()


def test_what_a_process_sets_that_a_run_cannot_have_is_refused(tiny, here, kit):
    config = configure("sft", **options(tiny))
    with pytest.raises(ValueError, match="gradients are off"), torch.no_grad():
        fit.fit(config)
    with pytest.raises(ValueError, match="gradients are off"), torch.inference_mode():
        fit.fit(config)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match="default dtype is torch.float64"):
            fit.fit(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match="max_steps is 3, but the source has 2 steps"):
        fit.fit(config, source=Fixed([[None]], total_steps=2))
    assert kit.listing(here) == set()


def test_a_method_of_ones_own_takes_no_name_and_no_config_class_of_another():
    @dataclasses.dataclass(frozen=True)
    class Own:
        """Options."""

    sft = methods.METHODS["sft"]
    for method, words in [
        (sft._replace(config=Own), "there is a method sft already"),
        (sft._replace(name="mine"), "Sft is the config of sft; give mine a class of its own"),
        ("sft", "'sft' is no method"),
    ]:
        with pytest.raises(ValueError, match=words):
            methods.register(method)
    assert methods.METHODS["sft"] is sft and "mine" not in methods.METHODS
    assert methods.register(sft._replace(help="a file that runs anew")).help and methods.register(sft) is sft


TRACKER = """
class Tracker:
    def __init__(self, file="steps.txt"):
        self.file = file

    def step(self, record):
        with open(self.file, "a") as file:
            file.write(f"{record['step']}\\n")

def track(event, record, *, name="log"):
    with open(name, "a") as file:
        file.write(event + "\\n")
"""


def test_the_observer_option_names_functions_and_classes(tiny, here, kit, tune):
    (here / "mine.py").write_text(TRACKER)
    args = ("--sample-prompt=", "--observer", "mine.py:Tracker?file=out.txt", "mine.py:track?name=events")
    assert tune("sft", *kit.basics(tiny, *args)).code == 0
    assert (here / "out.txt").read_text() == "1\n2\n"
    assert (here / "events").read_text().split() == ["start", "evaluation", "step", "step", "evaluation", "end", "summary"]
    assert "mine.py:Tracker?file=out.txt" in (here / "runs/sft-001/config.yaml").read_text()
    kit.refused(tune("sft", *kit.basics(tiny, "--observer", "mine.py:nothing")), "has no function nothing")
    kit.refused(tune("sft", *kit.basics(tiny, "--observer", "mine.py:track?nam=x")), "track has no option nam")


def test_a_source_of_ones_own_takes_the_place_of_data(tiny, here):
    seen = []

    class Spy(Fixed):
        def next(self, state, step):
            seen.append(step)
            return super().next(state, step)

    import numpy as np
    import torch

    from treetune.core.data import pack, spans
    from treetune.models import batches

    document = spans.Doc(np.arange(1, 9, dtype=np.int32), (np.arange(8) > 0).astype(np.float32), 1)
    sizes = policy.load(str(tiny.model)).cfg
    collate = batches.batcher(sizes, torch.device("cpu"), (pack.collate,))
    source = Spy([[collate([document])]], total_steps=2)
    result = fit.fit(configure("sft", model=tiny.model, sample_prompt="", learning_rate=0.01), source=source)
    losses = [record["train/loss"] for record in result.history]
    assert seen == [1, 2] and losses[1] < losses[0]
    # Two passes over its one step.
    parts = fit.fit(configure("sft", model=tiny.model, sample_prompt="", saves_per_epoch=1), source=Fixed(source.steps, total_steps=2))
    assert sorted(path.name for path in (parts.folder / "checkpoints").glob("step_*")) == ["step_000001", "step_000002"]


def test_a_source_without_epochs_has_no_parts_of_them(tiny, here):
    class Endless:
        total_steps = 2

    with pytest.raises(ValueError, match=r"saves_per_epoch needs a source that has passes\(step\), and Endless has none: give save_steps"):
        fit.fit(configure("sft", model=tiny.model, saves_per_epoch=1), source=Endless())  # type: ignore[arg-type]
