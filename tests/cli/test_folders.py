"""Folders and files that are not a run's: whatever a command is told to write, none of their bytes changes."""

import json
import shutil
from pathlib import Path

import pytest

from treetune.core import ckpt, owned
from treetune.core.run import folder
from treetune.models import fetch


def text(path: Path, words: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)
    return path


def project(root: Path) -> None:
    """What a user's own project may look like: a config.yaml, sources, rows and results of their own."""
    text(root / "config.yaml", "seed: 7\n")
    for name in ("train.py", "metrics.jsonl", "samples.jsonl", "best.json", "report.html", "checkpoints/step_000001/state.json"):
        text(root / name)


# {what is there: (prepare(here, run) -> extra arguments, words of the refusal)}. The run is told to overwrite `r`, if it names no other.


def in_project(here, run):
    shutil.rmtree(run)
    project(here)
    return ["--config", "config.yaml", "--output-dir", "."]


def above_project(here, run, monkeypatch):
    project(here / "inner")
    project(here)
    monkeypatch.chdir(here / "inner")
    return ["--output-dir", ".."]


def of_another_tool(here, run):
    shutil.rmtree(run)
    project(run)
    return []


def with_link(path):
    def prepare(here, run):
        (here / "elsewhere").mkdir()
        text(here / "elsewhere" / "file")
        target = run / path
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        target.symlink_to(here / "elsewhere" / ("file" if "." in path else ""))
        return []

    return prepare


def linked(here, run):
    (here / "link").symlink_to(run)
    return ["--output-dir", "link"]


def working(here, run, monkeypatch):
    monkeypatch.chdir(run)
    return ["--output-dir", "."]


def working_by_name(here, run, monkeypatch):
    monkeypatch.chdir(run)
    return ["--output-dir", "../r"]


def above(here, run, monkeypatch):
    (run / "checkpoints").mkdir(exist_ok=True)
    monkeypatch.chdir(run / "checkpoints")
    return ["--output-dir", ".."]


def at_home(here, run, monkeypatch):
    monkeypatch.setenv("HOME", str(run))
    return []


def reads(*args):
    return lambda here, run: [str(here / arg) if arg.startswith("r/") else arg for arg in args]


def model_inside(here, run, runs):
    shutil.copytree(runs / "full" / "model", run / "model")
    return ["--model", "r/model"]


def own_model(here, run, runs):
    shutil.rmtree(run)
    shutil.copytree(runs / "full", run)
    return ["--model", "r/model", "--adapter", "none"]


def own_model_by_link(here, run, runs):
    args = own_model(here, run, runs)
    (here / "base").symlink_to(run / "model")
    return ["--model", "base", *args[2:]]


def base_of_an_adapter(here, run, runs):
    own_model(here, run, runs)
    shutil.copytree(runs / "lora" / "adapter", here / "start")
    config = json.loads((here / "start/adapter_config.json").read_text())
    text(here / "start/adapter_config.json", json.dumps(config | {"base_model_name_or_path": str(run / "model")}))
    return ["--lora-model-dir", "start"]


def listed_data(here, run):
    text(here / "data.yaml", "datasets:\n- path: r/metrics.jsonl\n")
    return ["--config", "data.yaml"]


def pattern(here, run):
    return ["--data", "r/*.jsonl"]


def config_inside(here, run):
    return ["--config", "r/config.yaml"]


FOREIGN = {
    "the working folder, a project": (in_project, "it is the working folder"),
    "a parent, a project": (above_project, "a parent of the working folder"),
    "a folder with a config.yaml": (of_another_tool, "not made by treetune"),
    "the working folder, a run": (working, "it is the working folder"),
    "the working folder by another name": (working_by_name, "it is the working folder"),
    "a parent, a run": (above, "a parent of the working folder"),
    "the home folder": (at_home, "it is the home folder"),
    "a link to a run": (linked, "it is a link"),
    "notes": (lambda here, run: text(run / "notes.md") and [], "no run made r/notes.md"),
    "notes at a checkpoint": (lambda here, run: text(run / "checkpoints/step_000002/notes.md") and [], "notes.md"),
    "notes among checkpoints": (lambda here, run: text(run / "checkpoints/best/notes.md") and [], "r/checkpoints/best"),
    "a checkpoint by another name": (lambda here, run: text(run / "checkpoints/step_2/state.json") and [], "step_2"),
    "notes in the adapter": (lambda here, run: text(run / "adapter/README.md") and [], "README.md"),
    "a model that it did not make": (lambda here, run: text(run / "model/model.safetensors") and [], "r/model"),
    "an empty folder": (lambda here, run: (run / "empty").mkdir() or [], "r/empty"),
    "many files": (lambda here, run: [text(run / f"{i}.txt") for i in range(5)] and [], "r/0.txt, .* and 2 more"),
    "a link for a file": (with_link("metrics.jsonl"), "r/metrics.jsonl"),
    "a link for the checkpoints": (with_link("checkpoints"), "r/checkpoints"),
    "a link for the adapter": (with_link("adapter"), "r/adapter"),
    "a link in a checkpoint": (with_link("checkpoints/step_000002/state.json"), "state.json"),
    "a model inside": (model_inside, "r/model, which the run reads"),
    "its own model": (own_model, "r/model, which the run reads"),
    "its own model by a link": (own_model_by_link, "base, which the run reads"),
    "the base of an adapter": (base_of_an_adapter, "the base of --lora-model-dir"),
    "rows": (reads("--data", "r/metrics.jsonl"), "which the run reads .--data"),
    "rows by a pattern": (pattern, "which the run reads .--data"),
    "rows of a list": (listed_data, "which the run reads .--datasets"),
    "rows to evaluate on": (reads("--val-data", "r/metrics.jsonl"), "--val-data"),
    "an adapter to start from": (reads("--lora-model-dir", "r/adapter"), "--lora-model-dir"),
    "an adapter to start from, by its run": (reads("--lora-model-dir", "r"), "--lora-model-dir"),
    "prepared rows": (lambda here, run: text(run / "cache/x") and ["--dataset-prepared-path", "r/cache"], "--dataset-prepared-path"),
    "the config file": (config_inside, "r/config.yaml, which the run reads .--config"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", FOREIGN)
def test_overwrite_changes_nothing_foreign(what, kit, tiny, tune, here, run, runs, monkeypatch):
    prepare, words = FOREIGN[what]
    known = {"here": here, "run": run, "runs": runs, "monkeypatch": monkeypatch}
    args = prepare(**{name: known[name] for name in prepare.__code__.co_varnames[: prepare.__code__.co_argcount]})
    before = kit.snapshot(here)
    own = [] if "--output-dir" in args else ["--output-dir", "r"]
    without = (*["--data"] * ("--config" in args), *["--lora-r"] * ("--lora-model-dir" in args))
    kit.refused(tune("sft", *kit.basics(tiny, "--sample-prompt=", *args, *own, "--overwrite", without=without)), words)
    assert kit.snapshot(here) == before


@pytest.mark.parametrize("option", [("--ref-model", "r/model"), ("--reward-funcs", "r"), ("--rollout-func", "r/metrics.jsonl.py:x")])
def test_overwrite_spares_what_other_commands_read(option, kit, tiny, tune, here, runs):
    shutil.copytree(runs / "full", here / "r")
    command = "dpo" if option[0] == "--ref-model" else "grpo"
    if ".py" in option[1]:
        text(here / "r/metrics.jsonl.py")
    before = kit.snapshot(here)
    args = ["--model", tiny.model, "--data", tiny.chat, "--output-dir", "r", "--overwrite", *option]
    kit.refused(tune(command, *args), f"which the run reads .{option[0]}")
    assert kit.snapshot(here) == before


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_project_is_no_run(resume, kit, tiny, tune, here):
    project(here / "p")
    before = kit.snapshot(here)
    kit.refused(tune("sft", *kit.basics(tiny, "--output-dir", "p", *resume)), "p (already )?holds files")
    assert kit.snapshot(here) == before


def test_a_checkpoint_copied_into_a_project_resumes_elsewhere_only(kit, tiny, tune, here, run):
    project(here / "p")
    shutil.rmtree(here / "p/checkpoints")
    shutil.copytree(run / "checkpoints", here / "p/checkpoints")
    before = kit.snapshot(here / "p")
    kit.refused(tune("sft", *kit.basics(tiny, "--resume", "p/checkpoints/step_000002")), "does not lie in a run folder")
    kit.refused(tune("sft", *kit.basics(tiny, "--output-dir", "p", "--resume", "auto")), "holds files and no run")
    assert kit.snapshot(here / "p") == before


def test_notes_in_a_run_survive_its_end_and_its_pruning(kit, tiny, tune, here):
    """Beside a checkpoint that is pruned, and in an adapter that is written anew."""
    args = ["--output-dir", "r", "--save-steps", 1, "--sample-prompt=", "--save-total-limit", 1]
    assert tune("sft", *kit.basics(tiny, *args)).code == 0
    notes = [text(here / "r" / place / "notes.md", place) for place in ("", "adapter", "adapter/more", "checkpoints/step_000002")]
    assert tune("sft", *kit.basics(tiny, *args, "--max-steps", 4, "--resume", "auto")).code == 0
    assert [path.name for path in ckpt.steps(here / "r/checkpoints")][-1] == "step_000004"
    assert [path.read_text() for path in notes] == ["", "adapter", "adapter/more", "checkpoints/step_000002"]
    assert tune("generate", "hi", "--adapter", "r", "--max-new-tokens", 2).code == 0


def test_a_checkpoint_that_is_a_link_is_not_pruned(kit, tiny, tune, here, run):
    shutil.move(run / "checkpoints/step_000002", here / "kept")
    (run / "checkpoints/step_000002").symlink_to(here / "kept")
    before = kit.snapshot(here / "kept")
    args = ["--output-dir", "r", "--sample-prompt=", "--save-total-limit", 1, "--save-steps", 1, "--val-set-size", 0.1]
    assert tune("sft", *kit.basics(tiny, *args, "--max-steps", 4, "--resume", "auto")).code == 0
    assert kit.snapshot(here / "kept") == before and (run / "checkpoints/step_000002").is_symlink()


# Files and folders that other commands write.

OUTPUTS = {
    "merge": lambda here: ["merge", "r", here / "out"],
    "score": lambda here: ["score", "r", "--data", "rows.jsonl", "--output", here / "out"],
    "rollout": lambda here: ["rollout", "--output", here / "out"],
    "preprocess": lambda here: ["preprocess", "--html", here / "out"],
    "serve": lambda here: ["serve", "--log", here / "out"],
}
THERE = {
    "file": lambda path: text(path),
    "folder": lambda path: text(path / "file"),
    "link": lambda path: path.symlink_to(text(path.parent / "target")),
    "link that leads nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("there", THERE)
@pytest.mark.parametrize("command", OUTPUTS)
def test_no_command_replaces_what_it_did_not_make(command, there, kit, tune, here, run):
    THERE[there](here / "out")
    before = kit.snapshot(here)
    kit.refused(tune(*OUTPUTS[command](here)), "out exists")
    assert kit.snapshot(here) == before


def test_a_page_of_ours_is_replaced(tune, tiny, here):
    args = ["preprocess", "--model", tiny.model, "--data", tiny.chat, "--html", "page.html"]
    assert tune(*args).code == 0
    before = (here / "page.html").read_bytes()
    assert before.decode().startswith(owned.PAGE)
    done = tune(*args, "--max-rows", 4)
    assert done.code == 0 and (here / "page.html").read_bytes() != before, done.err


def test_an_output_that_appears_meanwhile_stays(here):
    """The results get another name: they are not lost either."""
    text(here / "out.jsonl"), text(here / "out-2.jsonl")
    assert folder.write_new(here / "out.jsonl", "results") == here / "out-3.jsonl"
    assert [(here / name).read_text() for name in ("out.jsonl", "out-2.jsonl", "out-3.jsonl")] == ["mine", "mine", "results"]
    assert len(list(here.iterdir())) == 3


def test_fetch_spares_what_is_at_its_place(kit, tune, here, monkeypatch):
    monkeypatch.setenv("TREETUNE_HOME", str(here / "home"))
    monkeypatch.setattr(fetch, "reachable", lambda *_: pytest.fail("asked for what has no place"))
    text(here / "home/models/smollm2-135m-instruct/model.safetensors")
    before = kit.snapshot(here)
    kit.refused(tune("fetch"), "already holds files")
    assert kit.snapshot(here) == before


def linked_rows(here, run):
    """The rows' folder leads into the run by a link."""
    text(run / "samples.jsonl")
    (here / "rows").mkdir()
    (here / "rows" / "x.jsonl").symlink_to(run / "samples.jsonl")


@pytest.mark.parametrize("data", ["rows", "rows/*.jsonl"])
def test_links_among_the_rows_count_as_what_is_read(data, kit, tiny, tune, here, run):
    linked_rows(here, run)
    before = kit.snapshot(here)
    kit.refused(tune("sft", *kit.basics(tiny, "--data", data, "--output-dir", "r", "--overwrite")), "holds rows/x.jsonl", "--data")
    assert kit.snapshot(here) == before


def test_a_chat_template_of_the_old_run_is_read(kit, tiny, tune, here, runs):
    shutil.copytree(runs / "full", here / "r")
    args = ["--chat-template", "r/model/chat_template.jinja", "--adapter", "none", "--output-dir", "r", "--overwrite"]
    kit.refused(tune("sft", *kit.basics(tiny, *args)), "--chat-template")


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "treetune_mine.json"])
def test_what_a_manifest_does_not_list_is_foreign_by_any_name(name, kit, tiny, tune, here, run):
    text(run / "adapter" / name)
    kit.refused(tune("sft", *kit.basics(tiny, "--output-dir", "r", "--overwrite")), f"no run made r/adapter/{name}")
    assert (run / "adapter" / name).read_text() == "mine"


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_a_copied_config_beside_a_base_model_is_no_run(how, kit, tiny, tune, here, runs):
    shutil.copytree(tiny.model, here / "r" / "model")
    shutil.copy(runs / "full" / "config.yaml", here / "r" / "config.yaml")
    args = kit.basics(tiny, "--adapter", "none", "--output-dir", "r", *([how] if how == "--overwrite" else [how, "auto"]))
    before = kit.snapshot(here)
    kit.refused(tune("sft", *args), "r")
    (here / "r" / "checkpoints").mkdir()
    kit.refused(tune("sft", *args), "r/model")
    assert {name: value for name, value in kit.snapshot(here).items() if name != "r/checkpoints"} == before


def test_a_resumed_run_never_replaces_the_model_that_it_reads(kit, tiny, tune, here):
    args = ["--adapter", "none", "--sample-prompt=", "--output-dir", "r"]
    assert tune("sft", *kit.basics(tiny, *args)).code == 0
    shutil.rmtree(here / "r" / "model")
    shutil.copytree(tiny.model, here / "r" / "model")
    before = kit.snapshot(here)
    kit.refused(
        tune("sft", *kit.basics(tiny, *args, "--model", "r/model", "--max-steps", 3, "--resume", "auto")), "r/model would be replaced"
    )
    assert kit.snapshot(here) == before


# {what a run without a checkpoint holds: (a file of others in it, extra arguments, words of the refusal)}
BEGINNING_ANEW = {
    "notes in the adapter": ("adapter/notes.txt", [], "no run made r/adapter/notes.txt"),
    "notes for checkpoints": ("checkpoints/notes", [], "no run made r/checkpoints/notes"),
    "a file named so": ("checkpoints", [], "no run made r/checkpoints"),
    "the adapter to start from": (None, ["--lora-model-dir", "r/adapter"], "r/adapter would be replaced by the run, which reads r/adapter"),
    "the run to start from": (None, ["--lora-model-dir", "r"], "it holds r, which the run reads"),
}


@pytest.mark.parametrize("case", BEGINNING_ANEW)
def test_a_run_without_checkpoints_takes_nothing_along_that_no_run_made(case, kit, tiny, tune, here, run):
    foreign, args, words = BEGINNING_ANEW[case]
    shutil.rmtree(run / "checkpoints")
    if foreign is not None:
        text(run / foreign)
    without = ("--lora-r",) if args else ()
    before = kit.snapshot(here)
    kit.refused(tune("sft", *kit.basics(tiny, *args, "--output-dir", "r", "--resume", "auto", without=without)), words)
    assert kit.snapshot(here) == before


def test_a_run_without_checkpoints_begins_anew_beside_notes_of_others(kit, tiny, tune, here, run):
    shutil.rmtree(run / "checkpoints")
    text(run / "notes.txt")
    assert tune("sft", *kit.basics(tiny, "--output-dir", "r", "--resume", "auto")).code == 0
    assert (run / "notes.txt").read_text() == "mine" and len(list((run / "checkpoints").iterdir())) > 0


@pytest.mark.parametrize("option", [("--output-dir", "~"), ("--output-dir", "~/runs/x"), ("--dataset-prepared-path", "~other/x")])
def test_no_folder_is_called_home(option, kit, tiny, tune, here):
    kit.refused(tune("sft", *kit.basics(tiny, *option)), "would lie in a folder called ~", "home folder")
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "best.json", "report.html"])
def test_a_folder_under_the_name_of_a_file_is_told_first(name, kit, tiny, tune, here, run):
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    before = kit.snapshot(here)
    args = kit.basics(tiny, "--output-dir", "r", "--max-steps", 3, "--resume", "auto")
    kit.refused(tune("sft", *args), f"r/{name} is a folder")
    assert kit.snapshot(here) == before


def test_a_file_called_runs_is_named(kit, tiny, tune, here):
    text(here / "runs")
    kit.refused(tune("sft", *kit.basics(tiny)), "runs is a file; expected a folder of runs")


def test_a_page_goes_into_a_new_folder_and_not_over_the_report_of_a_run(kit, tiny, tune, here, run):
    args = ["preprocess", "--data", tiny.chat, "--model", tiny.model, "--sequence-len", 128, "--html"]
    assert tune(*args, "new/deep/page.html").code == 0 and (here / "new/deep/page.html").is_file()
    before = kit.snapshot(here)
    kit.refused(tune(*args, "r/report.html"), "r/report.html belongs to a run")
    assert kit.snapshot(here) == before
