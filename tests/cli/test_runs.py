"""Whole training runs on a tiny model: what they leave, how they continue, and why they stop."""

import html.parser
import json
import math
from dataclasses import replace

import pytest
import torch

from treetune.cli import parse
from treetune.cli.methods.sft import Sft
from treetune.cli.options.run import STARTS
from treetune.core import ckpt, manifest, tree
from treetune.core.config import reading
from treetune.core.run import evaluation, faults, loop, recorder
from treetune.losses import sft_objective
from treetune.models import adapter, batches, hf

FILES = {
    ".treetune.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "best.json", "checkpoints", "status.json", "run.log",
}  # fmt: skip
VOID = {"meta"}


class Balance(html.parser.HTMLParser):
    """Fails on a tag that is not closed, or closed and not open."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def steps_of(records):
    return [record["step"] for record in records if "train/loss" in record]


def evals_of(records):
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def checkpoints(root):
    return [path.name for path in ckpt.steps(root / "checkpoints")]


def test_lora_run_leaves_everything_and_only_that(kit, here, sft):
    done = sft("--max-steps", 4, "--save-steps", 2, "--eval-steps", 2, "--learning-rate", 0.01)
    root = here / "runs/sft-001"
    assert done.code == 0 and done.err == ""
    assert {path.name for path in root.iterdir()} == FILES | {"adapter"}
    saved = {"adapter_config.json", "adapter_model.safetensors", adapter.BASE_FILE, manifest.NAME}
    words = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in (root / "adapter").iterdir()} == saved | words | {"README.md", "treetune_card.json"}
    records = kit.metrics(root)
    assert steps_of(records) == [1, 2, 3, 4] and list(evals_of(records)) == [0, 2, 4]
    assert evals_of(records)[4] < evals_of(records)[0]
    best = min(evals_of(records), key=evals_of(records).get)
    assert json.loads((root / "best.json").read_text()) == {"checkpoint": f"step_{best:06d}", "eval_loss": evals_of(records)[best]}
    assert checkpoints(root) == ["step_000002", "step_000004"]
    assert {path.name for path in (root / "checkpoints/step_000004").iterdir()} == {"state.safetensors", "state.json", manifest.NAME}
    samples = kit.samples(root)
    assert [sample["step"] for sample in samples] == [0, 4] and all(sample["prompt"] for sample in samples)


def test_report_is_well_formed_and_shows_curves_masks_and_samples(here, sft):
    assert sft("--max-steps", 3, "--sample-prompt", "<b>1 & 2</b>").code == 0
    page = Balance()
    page.feed((here / "runs/sft-001/report.html").read_text())
    assert page.open == [] and page.seen.count("svg") == 6 and page.seen.count("path") == 8
    text = "".join(page.text)
    assert "loss (nats per supervised token)" in text and "train/loss" in text and "eval/loss" in text
    assert "<b>1 & 2</b>" in text and "b" not in page.seen
    assert page.seen.count("i") > 100, "the tokens of the first documents"


def test_full_run_leaves_a_model_that_transformers_loads_and_eval_agrees_with(kit, here, tiny, sft, tune):
    import transformers

    assert sft("--adapter", "none", "--learning-rate", 0.01, "--val-data", tiny.chat).code == 0
    root = here / "runs/sft-001"
    assert {path.name for path in root.iterdir()} == FILES | {"model"}
    _, report = transformers.AutoModelForCausalLM.from_pretrained(root / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    moved = kit.tensors(root / "model/model.safetensors")
    assert not any(torch.equal(leaf, moved[key]) for key, leaf in kit.tensors(tiny.model / "model.safetensors").items())
    done = tune("eval", "--model", root / "model", "--data", tiny.chat, "--sequence-len", 128)
    assert math.isclose(loss_of(done), evals_of(kit.metrics(root))[2], abs_tol=2e-6)


def loss_of(done):
    assert done.code == 0, done.err
    return float(done.out.split("loss ")[1].split()[0])


def test_config_of_a_run_reads_back_as_the_same_config_and_run(kit, here, tiny, sft, tune):
    assert sft("--output-dir", "a", "--lora-layers", 1, "--lora-dropout", 0.1, "--sample-prompt", "- x: {1}", "--warmup-steps", 1).code == 0
    text = (here / "a/config.yaml").read_text()
    again, given = parse.parse("sft", Sft, ["--config", "a/config.yaml"])
    first, _ = parse.parse("sft", Sft, kit.basics(tiny, "--output-dir", "a", "--lora-layers", "1", "--lora-dropout", "0.1",
                                                        "--sample-prompt=- x: {1}", "--warmup-steps", "1"))  # fmt: skip
    first = replace(first, run=replace(first.run, sharding="none"))  # a run writes down what its processes came to
    assert again == first and f"method: sft\n{reading.to_yaml(again, without=STARTS)}" == text
    assert "lora_dropout" in given and "momentum" not in given
    done = tune("sft", "--config", "a/config.yaml", "--output-dir", "b")
    assert done.code == 0, done.err
    assert kit.timeless(kit.metrics(here / "a")) == kit.timeless(kit.metrics(here / "b"))
    assert kit.same(kit.state(here / "a", 2), kit.state(here / "b", 2))


AGAIN = [["--optimizer", "adafactor", "--optim-args", "scale_parameter=true"], ["--adapter", "none"], ["--loss", "eaft"]]
LATER = [
    ["--optimizer", "muon"],
    ["--optimizer", "adamw_torch_4bit", "--learning-rate", 1e-3],
    ["--optimizer", "lion"],
    ["--optimizer", "sgd", "--momentum", 0.5],
    ["--val-set-size", 0],
    ["--lr-scheduler", "linear"],
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("extra", AGAIN + [pytest.param(extra, marks=pytest.mark.slow) for extra in LATER])
def test_config_of_any_run_can_be_run_again(extra, kit, here, sft, tune):
    assert sft("--output-dir", "a", *extra).code == 0
    done = tune("sft", "--config", "a/config.yaml", "--output-dir", "b")
    assert done.code == 0, done.err
    assert kit.same(kit.state(here / "a", 2), kit.state(here / "b", 2))


def test_overwriting_and_resuming_are_not_handed_on(here, sft, tune):
    assert sft("--output-dir", "a").code == 0
    assert sft("--output-dir", "a", "--overwrite").code == 0
    done = tune("sft", "--config", "a/config.yaml")
    assert done.code == 2 and "a already holds files" in done.err


def test_flags_win_over_the_file_and_the_file_over_defaults(here, tiny, sft):
    (here / "c.yaml").write_text(f"model: {tiny.other}\nseed: 7\nlora_target_modules: [q_proj, v_proj]\nlearning_rate: 1e-3\n")
    parsed, given = parse.parse("sft", Sft, ["--config", "c.yaml", "--seed=8"])
    assert parsed.optim.seed == 8 and parsed.optim.learning_rate == 1e-3 and parsed.model.model == str(tiny.other)
    assert parsed.adapter.lora_target_modules == ("q_proj", "v_proj") and parsed.adapter.lora_r == 16
    assert given == {"seed", "model", "lora_target_modules", "learning_rate"}


@pytest.fixture
def scripted(monkeypatch):
    """scripted(losses) makes the evaluations of a run report these losses, in order."""

    def script(losses):
        left = iter(losses)
        monkeypatch.setattr(evaluation, "of_documents", lambda *_, **__: lambda state: {"loss": torch.tensor(next(left))})

    return script


def test_save_limit_keeps_the_newest_and_the_best(here, sft, scripted):
    scripted([5.0, 4.0, 3.0, 3.5, 3.6, 3.7])
    assert sft("--max-steps", 5, "--save-steps", 1, "--eval-steps", 1, "--save-total-limit", 2).code == 0
    assert checkpoints(here / "runs/sft-001") == ["step_000002", "step_000004", "step_000005"]
    assert json.loads((here / "runs/sft-001/best.json").read_text()) == {"checkpoint": "step_000002", "eval_loss": 3.0}


def test_save_limit_of_one_without_evaluation(here, sft):
    assert sft("--max-steps", 5, "--save-steps", 2, "--save-total-limit", 1, "--val-set-size", 0).code == 0
    assert checkpoints(here / "runs/sft-001") == ["step_000005"]
    assert not (here / "runs/sft-001/best.json").exists()


def test_early_stop_after_patience_evaluations(kit, here, sft, scripted):
    scripted([5.0, 4.0, 4.5, 3.9, 4.2, 3.9, 1.0])
    done = sft("--max-steps", 9, "--eval-steps", 1, "--save-steps", 9, "--early-stopping-patience", 2)
    root = here / "runs/sft-001"
    assert done.code == 0 and "eval/loss has not improved in 2 evaluations" in done.out
    assert steps_of(kit.metrics(root)) == [1, 2, 3, 4, 5] and checkpoints(root) == ["step_000003", "step_000005"]
    assert (root / "adapter").is_dir() and (root / "report.html").exists()


def test_watchdog_stops_the_run(kit, here, sft):
    done = sft("--max-steps", 9, "--loss-watchdog-threshold", 0.5, "--loss-watchdog-patience", 2, "--save-steps", 1)
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.startswith("treetune: failed: train/loss was above 0.5 for 2 steps, up to step 2; the last checkpoint is ")
    assert not (here / "runs/sft-001/adapter").exists()


def test_loss_below_the_threshold_lets_the_run_go_on(sft):
    assert sft("--loss-watchdog-threshold", 50, "--loss-watchdog-patience", 1).code == 0


def assert_stopped(done, *words):
    assert done.code == 1 and done.err.count("\n") == 1 and done.err.startswith("treetune: failed: step "), done.err
    assert all(word in done.err for word in ("is not finite, no weight was changed", *words)), done.err


def test_loss_that_is_not_finite_stops_the_run_and_names_the_rows(kit, here, sft):
    """Weights of 1e35 are finite, what they compute is not."""
    done = sft("--adapter", "none", "--optimizer", "sgd", "--learning-rate", 1e35, "--max-steps", 5, "--save-steps", 1, "--val-set-size", 0)
    assert_stopped(done, "step 2", "rows [", "the last checkpoint is runs/sft-001/checkpoints/step_000001")
    assert checkpoints(here / "runs/sft-001") == ["step_000001"] and not (here / "runs/sft-001/model").exists()


def test_records_of_a_failed_step_are_json_all_the_same(here, sft):
    assert sft("--adapter", "none", "--optimizer", "sgd", "--learning-rate", 1e35, "--max-steps", 5, "--val-set-size", 0).code == 1
    lines = (here / "runs/sft-001/metrics.jsonl").read_text().splitlines()
    last = [json.loads(line, parse_constant=pytest.fail) for line in lines][-1]
    assert last["step"] == 2 and last["skipped"] == 1 and last["grad_norm"] is None


def test_out_of_memory_is_one_line_with_the_fix(sft, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")

    monkeypatch.setattr(loop._Loop, "steps", full)
    done = sft()
    assert done.code == 1 and done.err.count("\n") == 1 and "2 GiB" in done.err
    assert "try --micro-batch-size 1 --gradient-accumulation-steps 4, about " in done.err and "1. --micro-batch-size 1" in done.out


def test_gradient_that_is_not_finite_names_rows_and_leaf_and_changes_nothing(kit, here, sft, monkeypatch):
    """The third step's gradient is poisoned behind a loss that is fine, and the weights are compared bit for bit."""
    seen, make = [], sft_objective.named

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    def objective(*args, **kwargs):
        plain = make(*args, **kwargs)

        def terms(params, frozen, batch, plan):
            if steps[-1] == 2 and torch.is_grad_enabled():
                layer = params["lora"]["layers"][1]
                layers = [
                    params["lora"]["layers"][0],
                    layer | {"v_proj": {"A": Poison.apply(layer["v_proj"]["A"]), "B": layer["v_proj"]["B"]}},
                ]
                params = params | {"lora": params["lora"] | {"layers": layers}}
            return plain.terms(params, frozen, batch, plan)

        return plain._replace(terms=terms)

    steps, push = [0], recorder.Recorder.push

    def counted(self, index, metrics):
        steps.append(index)
        return push(self, index, metrics)

    def found(objective, state, batches):
        steps.append(2)
        seen.append({path: leaf.clone() for path, leaf in tree.items(state.params)})
        return find(objective, state, batches)

    find = faults.find_not_finite
    monkeypatch.setattr(sft_objective, "named", objective)
    monkeypatch.setattr(recorder.Recorder, "push", counted)
    monkeypatch.setattr(faults, "find_not_finite", found)
    done = sft("--max-steps", 3, "--save-steps", 2, "--val-set-size", 0, "--learning-rate", 0.01)
    assert_stopped(done, "step 3", "rows [", "lora.layers.1.v_proj.A", "step_000002")
    saved = kit.state(here / "runs/sft-001", 2)
    assert all(torch.equal(leaf, saved[f"params.{path}"]) for path, leaf in seen[0].items())


def test_leaf_without_gradient_stops_the_run(sft):
    done = sft("--lora-alpha", 1e-30, "--max-steps", 3)
    assert done.code == 1 and "trainable leaves get no gradient" in done.err and "lora.layers.0" in done.err


def test_max_steps_goes_past_the_epochs(kit, here, sft):
    assert sft("--max-steps", 9, "--max-rows", 6, "--val-set-size", 0).code == 0
    records = kit.metrics(here / "runs/sft-001")
    assert steps_of(records)[-1] == 9 and records[-1]["epoch"] > 0


def test_epochs_see_every_row_once_each_in_another_order(here, sft, monkeypatch):
    seen, stream = [], batches._stream

    def micro_batch(collate, documents, seed, *rest):
        seen.append((seed is None, [doc.row for doc in documents]))
        return stream(collate, documents, seed, *rest)

    monkeypatch.setattr(batches, "_stream", micro_batch)
    assert sft("--max-rows", 10, "--val-set-size", 0, "--num-epochs", 2, "--sample-prompt=", without=("--max-steps",)).code == 0
    rows = [row for evaluating, taken in seen if not evaluating for row in taken]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(1, 11)) and rows[:10] != rows[10:]


def test_health_rule_is_printed_once_with_its_fix(sft):
    done = sft("--max-steps", 4, "--max-grad-norm", 0, "--z-loss-coef", 1e6)
    assert done.code == 0 and done.out.count("is above 100: lower learning_rate") == 1


def test_chat_template_of_the_run_is_that_of_its_model(tiny, sft, kit, here):
    assert sft("--model", tiny.bare, "--chat-template", kit.CHATML, "--adapter", "none").code == 0
    assert hf.tokenizer(here / "runs/sft-001/model").chat_template == kit.CHATML
    assert "<|im_start|>" not in kit.samples(here / "runs/sft-001")[0]["prompt"]


def test_model_keeps_the_stop_ids_of_the_one_it_came_from(tiny, sft, tune, here):
    import shutil

    model = shutil.copytree(tiny.model, here / "m")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 256], "max_length": 77}))
    assert sft("--model", model, "--adapter", "none").code == 0
    assert sft("--model", model, "--output-dir", "b").code == 0 and tune("merge", "b", "merged").code == 0
    for made in ("runs/sft-001/model", "merged"):
        assert hf.generation_config(here / made)["eos_token_id"] == [5, 256]


def test_run_on_a_terminal_computes_the_same_under_a_progress_bar(kit, here, sft, monkeypatch):
    assert sft("--output-dir", "plain", "--max-steps", 4).code == 0
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = sft("--output-dir", "bar", "--max-steps", 4)
    assert done.code == 0 and "\x1b[" in done.out and "4/4" in done.out
    assert kit.timeless(kit.metrics(here / "bar")) == kit.timeless(kit.metrics(here / "plain"))


def test_loop_reads_metrics_a_step_late_and_loses_none(kit, here, sft):
    assert sft("--max-steps", 5, "--logging-steps", 3).code == 0
    assert steps_of(kit.metrics(here / "runs/sft-001")) == [1, 2, 3, 4, 5]
    assert loop.Progress().tokens_seen == 0 and kit.metrics(here / "runs/sft-001")[-2]["num_tokens"] > 0
