"""What a resumed run reads must be what it was made with: rows, supervision, columns, weights, held-out rows, whatever the lengths say."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from treetune.core import ckpt, manifest
from treetune.core.data import template_date
from treetune.core.run import provenance, resume_rules
from treetune.models import hf


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAIRS, GRPO, EBFT = (_module(f"test_{name}") for name in ("preference", "grpo", "ebft_structured"))
TRAIN, HELD = "other documents to train on than it was made with", "other held-out documents than it was made with"


def _edited(rows: list[dict], i: int, **fields) -> list[dict]:
    return [*rows[:i], rows[i] | fields, *rows[i + 1 :]]


def _letters(rows: list[dict], name: str, i: int = 0) -> list[dict]:
    """As many characters, hence as many tokens of the tests' tokenizer."""
    return _edited(rows, i, **{name: rows[i][name][::-1].swapcase()})


def _pairs() -> list[dict]:
    return [row | {"margin": float(i)} for i, row in enumerate(PAIRS.rows_of("reward"))]


GRPO_ROWS, EBFT_ROWS = [GRPO.prompt(i) for i in range(20)], [EBFT.row(i) for i in range(20)]
# name: command, rows, rows that are read on resuming, what is said
EDITS = {
    "a chosen answer": ("dpo", PAIRS.rows_of("dpo"), lambda rows: _letters(rows, "chosen", 1), TRAIN),
    "chosen and rejected": (
        "dpo", PAIRS.rows_of("dpo"), lambda rows: _edited(rows, 3, chosen=rows[3]["rejected"], rejected=rows[3]["chosen"]), TRAIN,
    ),
    "a label": ("kto", PAIRS.rows_of("kto"), lambda rows: _edited(rows, 3, label=not rows[3]["label"]), TRAIN),
    "a margin": ("reward", _pairs(), lambda rows: _edited(rows, 3, margin=9.5), TRAIN),
    "a label of a step": ("prm", PAIRS.rows_of("prm"), lambda rows: _edited(rows, 3, labels=[not one for one in rows[3]["labels"]]), TRAIN),
    "a column of rewards": ("grpo", GRPO_ROWS, lambda rows: _edited(rows, 3, answer="77"), TRAIN),
    "a true reply": ("ebft", EBFT_ROWS, lambda rows: _letters(rows, "output", 3), TRAIN),
    "the order of rows": ("grpo", GRPO_ROWS, lambda rows: rows[::-1], TRAIN),
}  # fmt: skip
FAST = ("a label", "a column of rewards")


@pytest.mark.parametrize("what", [what if what in FAST else pytest.param(what, marks=pytest.mark.slow) for what in EDITS])
def test_rows_of_equal_lengths_are_not_the_same_rows(what, kit, tiny, here, tune):
    command, rows, edit, words = EDITS[what]
    (here / "rewards.py").write_text(GRPO.REWARDS)
    held = ["--val-set-size", 0]
    args = {
        "grpo": lambda: GRPO.arguments(tiny, "--data", "rows.jsonl"),
        "ebft": lambda: EBFT.arguments(tiny, "--data", "rows.jsonl"),
    }.get(command, lambda: PAIRS.arguments(tiny, command, "--data", "rows.jsonl", *held))()
    kit.write_rows(here / "rows.jsonl", rows)
    assert tune(command, *args).code == 0
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    kit.write_rows(here / "rows.jsonl", edit(rows))
    kit.refused(tune(command, *args, "--resume", "auto"), "step_000002 cannot be continued with", words)
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before
    kit.write_rows(here / "rows.jsonl", rows)
    assert tune(command, *args, "--resume", "auto").code == 0


def _chats(kit, i: int | None = None) -> list[dict]:
    rows = kit.chats(24)
    if i is not None:
        rows[i]["messages"][0]["content"] = rows[i]["messages"][0]["content"].upper()[::-1]
    return rows


def test_an_edited_row_a_moved_file_and_held_out_rows(kit, here, sft):
    kit.write_rows(here / "rows.jsonl", _chats(kit))
    kit.write_rows(here / "val.jsonl", _chats(kit)[:4])
    args = ["--data", "rows.jsonl", "--val-data", "val.jsonl", "--output-dir", "run"]
    assert sft(*args).code == 0
    for file, rows, words in (("rows.jsonl", _chats(kit, 7), TRAIN), ("val.jsonl", _chats(kit, 2)[:4], HELD)):
        plain = (here / file).read_bytes()
        kit.write_rows(here / file, rows)
        kit.refused(sft(*args, "--resume", "auto"), words, "no option says so")
        (here / file).write_bytes(plain)
    (here / "rows.jsonl").rename(here / "moved.jsonl")
    moved = ["--data", "moved.jsonl", "--val-data", "val.jsonl", "--output-dir", "run", "--dataset-prepared-path", "prepared"]
    done = sft(*moved, "--max-steps", 3, "--resume", "auto")
    assert done.code == 0, done.err
    listed = done.out.partition("changed since the checkpoint:\n")[2].splitlines()[:3]
    assert listed == ["  data rows.jsonl -> moved.jsonl", "  dataset_prepared_path none -> prepared", "  max_steps 2 -> 3"]
    again = sft(*moved, "--max-steps", 4, "--resume", "auto")
    assert again.code == 0 and "prepared earlier" in again.out, "the fingerprint is kept with the rows"
    kit.write_rows(here / "moved.jsonl", _chats(kit, 7))
    kit.refused(sft(*moved, "--max-steps", 5, "--resume", "auto"), TRAIN)


@pytest.mark.slow
def test_weights_of_data_sets_and_options_of_one_of_them(kit, here, sft):
    kit.write_rows(here / "a.jsonl", _chats(kit))
    kit.write_rows(here / "b.jsonl", _chats(kit)[5:9])

    def run(first: dict, *more):
        (here / "c.yaml").write_text(yaml.safe_dump({"datasets": [{"path": "a.jsonl"} | first, {"path": "b.jsonl"}]}))
        return sft("--config", "c.yaml", "--output-dir", "run", *more, without=("--data",))

    assert run({"weight": 2}).code == 0
    for first in ({"weight": 3}, {"weight": 2, "train_on_inputs": True}, {"weight": 2, "split": "train[:20]"}):
        kit.refused(run(first, "--resume", "auto"), r"cannot be continued with datasets .+ instead of")
    assert run({"weight": 2, "type": "chat"}, "--max-steps", 3, "--resume", "auto").code == 0, "the same documents"


def test_another_command_and_another_tokenizer(kit, tiny, here, tune, sft):
    assert sft("--output-dir", "run", "--adapter", "none").code == 0
    args = ["--model", tiny.model, "--data", tiny.text, "--sequence-len", 64, "--output-dir", "run", "--resume", "auto"]
    kit.refused(tune("pretrain", *args), "was made by treetune sft: continue it with that command, not pretrain")
    shutil.copytree(tiny.model, here / "model")
    config = json.loads((here / "model/tokenizer_config.json").read_text())
    (here / "model/tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|im_start|>"}))
    manifests = [path for path in (here / "model").glob("*") if path.name == manifest.NAME]
    for path in manifests:
        path.unlink()
    kit.refused(sft("--output-dir", "run", "--adapter", "none", "--model", "model", "--resume", "auto"), "the tokenizer numbers")


@pytest.fixture
def aged(here, monkeypatch):
    """aged(run) makes a checkpoint one of the version that kept lengths and frozen weights only."""
    streams, plain = [], provenance.check

    def check(origin, **more):
        streams.append(more["stream"])
        return plain(origin, **more)

    monkeypatch.setattr(provenance, "check", check)

    def age(folder: Path, base: bool):
        for path in folder.glob("checkpoints/step_*"):
            meta = json.loads((path / "state.json").read_text())
            known = meta.pop(provenance.KEY)
            frozen = {"model": hf.load(known["options"]["model"], dtype=torch.float32, device="cpu").params} if base else {}
            meta |= {"format": 1, "stream": streams[-1], "base_digest": ckpt.digest(frozen) if base else ""}
            (path / "state.json").write_text(json.dumps(meta))
            (path / manifest.NAME).unlink()

    return age


def test_a_checkpoint_of_an_earlier_version_goes_on_or_is_refused_in_a_line(kit, tiny, here, sft, aged):
    assert sft("--output-dir", "run").code == 0
    aged(here / "run", base=True)
    resumed = ["--output-dir", "run", "--resume", "auto", "--max-steps"]
    for args, words in {
        ("--lora-alpha", 64): "lora_alpha 64 instead of 32",
        ("--train-on-inputs",): "train_on_inputs true instead of false",
        ("--model", tiny.same): "model .* instead of",
        ("--gradient-accumulation-steps", 1): "gradient_accumulation_steps 1 instead of 2",
    }.items():
        kit.refused(sft(*resumed, 3, *args), words)
    done = sft(*resumed, 3, "--learning-rate", 1e-5)
    assert done.code == 0, done.err
    assert "written by an earlier version: its options are taken from run/config.yaml" in done.out
    assert "  learning_rate 0.0002 -> 1e-05\n  max_steps 2 -> 3\n" in done.out
    assert sft(*resumed, 4).code == 0, "the checkpoint after it is of this version"


def test_a_checkpoint_of_an_earlier_version_without_its_options(kit, here, sft, aged):
    assert sft("--output-dir", "run", "--adapter", "none").code == 0
    aged(here / "run", base=False)
    shutil.copytree(here / "run/checkpoints/step_000002", here / "alone/checkpoints/step_000002")
    args = ["--adapter", "none", "--output-dir", "new", "--resume", "alone/checkpoints/step_000002"]
    kit.refused(sft(*args, "--max-rows", 20), "other data, packing or batch options")
    done = sft(*args, "--max-steps", 3)
    assert done.code == 0 and "which options changed is not known" in done.out, done.err


def test_the_checkpoint_is_asked_and_not_a_file_that_was_edited(kit, here, sft):
    assert sft("--output-dir", "run").code == 0
    config = yaml.safe_load((here / "run/config.yaml").read_text()) | {"lora_alpha": 64.0}
    (here / "run/config.yaml").write_text(yaml.safe_dump(config))
    resumed = ["--output-dir", "run", "--resume", "auto", "--max-steps", 3]
    kit.refused(sft(*resumed, "--lora-alpha", 64), "lora_alpha 64 instead of 32", "--config run/config.yaml has its options")
    assert sft(*resumed).code == 0


def test_another_function_in_the_file_of_a_reward_is_listed(tiny, here, kit, tune):
    (here / "rewards.py").write_text(GRPO.REWARDS)
    kit.write_rows(here / "prompts.jsonl", GRPO_ROWS)
    assert tune("grpo", *GRPO.arguments(tiny)).code == 0
    (here / "rewards.py").write_text(GRPO.REWARDS + "\n# mended\n")
    done = tune("grpo", *GRPO.arguments(tiny, "--max-steps", 3, "--resume", "auto"))
    assert done.code == 0, done.err
    listed = done.out.partition("changed since the checkpoint:\n")[2].splitlines()[:2]
    assert listed == ["  max_steps 2 -> 3", f"  {GRPO.SPREAD}: the file of this function changed"]
    (here / "elsewhere").mkdir()
    (here / "rewards.py").rename(here / "elsewhere" / "rewards.py")
    moved = GRPO.arguments(tiny, "--max-steps", 4, "--resume", "auto")
    moved[moved.index(GRPO.SPREAD)] = f"elsewhere/{GRPO.SPREAD}"
    done = tune("grpo", *moved)
    assert done.code == 0 and f"  reward_funcs {GRPO.SPREAD} -> elsewhere/{GRPO.SPREAD}\n" in done.out, done
    (here / "elsewhere" / "rewards.py").write_text(GRPO.REWARDS)
    moved[moved.index(f"elsewhere/{GRPO.SPREAD}")] = str(here / "elsewhere" / GRPO.SPREAD)
    kit.refused(tune("grpo", *moved), "reward_funcs .* instead of elsewhere")


@pytest.mark.parametrize("changes", [{"rope_theta": 777.0}, pytest.param({"rms_norm_eps": 0.01}, marks=pytest.mark.slow)])
def test_a_model_that_computes_otherwise_with_the_same_weights_is_refused(changes, tiny, here, kit, tune, sft):
    for name in ("own", "ref"):
        shutil.copytree(tiny.model, here / name)

    def edit(name, changes):
        file = here / name / "config.json"
        config = json.loads(file.read_text()) | changes
        if "rope_theta" in changes:
            config.pop("rope_parameters", None)
        file.write_text(json.dumps(config))

    kit.write_rows(here / "dpo.jsonl", PAIRS.rows_of("dpo"))
    args = [*PAIRS.arguments(tiny, "dpo", "--ref-model", "ref"), "--model", "own"]
    if str(tiny.model) in map(str, args):
        at = list(map(str, args)).index(str(tiny.model))
        args = args[: at - 1] + args[at + 1 :]
    assert tune("dpo", *args).code == 0
    before = {name: (here / name / "config.json").read_text() for name in ("own", "ref")}
    edit("ref", changes)
    kit.refused(tune("dpo", *args, "--resume", "auto"), "another reference")
    (here / "ref" / "config.json").write_text(before["ref"])
    edit("own", changes)
    kit.refused(tune("dpo", *args, "--resume", "auto"), "another base model")
    assert sft("--model", "own", "--output-dir", "s", "--sample-prompt=").code == 0
    (here / "own" / "config.json").write_text(before["own"])
    kit.refused(
        tune("sft", *kit.basics(tiny, "--model", "own", "--lora-model-dir", "s", "--output-dir", "t", without=("--lora-r",))),
        "was trained on",
    )
    edit("own", {"max_position_embeddings": 300, "initializer_range": 0.5})
    assert tune("dpo", *args, "--resume", "auto").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("role", ["adapter", "reference"])
def test_weights_that_were_replaced_in_place_are_refused(role, tiny, here, kit, tune, sft):
    shutil.copytree(tiny.same, here / "other")
    assert sft("--output-dir", "start").code == sft("--output-dir", "second", "--seed", 5).code == 0
    kit.write_rows(here / "dpo.jsonl", PAIRS.rows_of("dpo"))
    own = {"adapter": ["--lora-model-dir", "start"], "reference": ["--ref-model", "other"]}[role]
    args = PAIRS.arguments(tiny, "dpo", *own)
    assert tune("dpo", *args).code == 0
    changed, new = {"adapter": (here / "start/adapter", here / "second/adapter"), "reference": (here / "other", tiny.untied)}[role]
    shutil.rmtree(changed)
    shutil.copytree(new, changed)
    kit.refused(tune("dpo", *args, "--resume", "auto"), f"another {role}: its weights are not those it was made with")


def test_a_password_of_an_address_is_not_shown():
    assert resume_rules.shown(["s3://me:secret@host/rows.jsonl"]) == "s3://***@host/rows.jsonl"


DATED = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\\n' }}"


def test_a_template_that_writes_the_date_keeps_that_of_the_start(kit, tiny, here, sft, monkeypatch):
    """On the next day the same rows would else be other documents, of a run that nobody changed."""
    (here / "dated.jinja").write_text(DATED + kit.CHATML)
    args = ["--chat-template", "dated.jinja", "--dataset-prepared-path", "prepared", "--output-dir", "run", "--sample-prompt", "hello"]
    monkeypatch.setattr(template_date._Day, "chosen", template_date._Day.chosen)
    monkeypatch.setattr(template_date, "today", lambda: "2026-02-28")
    assert sft(*args).code == 0
    monkeypatch.setattr(template_date, "today", lambda: "2026-03-01")
    done = sft(*args, "--max-steps", 3, "--resume", "auto")
    assert done.code == 0 and "prepared earlier" in done.out, done.err
    assert ckpt.read_meta(here / "run/checkpoints/step_000003")[provenance.KEY]["words"]["date"] == "2026-02-28"
    fresh = sft(*args[:-4], "--output-dir", "other")
    assert fresh.code == 0 and "prepared earlier" not in fresh.out, "a new run has the date of its own start"
