"""A run folder in the hands of one process: what steps aside comes back, what is left behind blocks nobody."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from treetune.core import ckpt, drafts, lock
from treetune.core.run import folder, marker, recorder


def text(path: Path, words: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)
    return path


FILES = {
    ".treetune.json", "config.yaml", "metrics.jsonl", "checkpoints", "best.json", "report.html", "status.json", "run.log",
}  # fmt: skip

# The run that is replaced.


def boom(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["assemble", "create", "sample", "step", "record"])
def test_the_old_run_is_put_back_when_the_new_one_does_not_begin(at, kit, tiny, tune, here, run, monkeypatch):
    from treetune.cli import assembly
    from treetune.core.run import loop
    from treetune.models import sampling

    before = kit.snapshot(here)
    place = {"assemble": (assembly, "assemble"), "create": (ckpt.Path, "mkdir"), "sample": (loop, "run"), "step": (loop._Loop, "record")}
    place |= {"record": (sampling, "in_parts")}
    if at == "create":
        mkdir = Path.mkdir
        monkeypatch.setattr(Path, "mkdir", lambda self, *a, **k: boom() if self.name == "checkpoints" else mkdir(self, *a, **k))
    else:
        monkeypatch.setattr(*place[at], boom)
    prompt = [] if at == "record" else ["--sample-prompt="]
    assert tune("sft", *kit.basics(tiny, *prompt, "--output-dir", "r", "--overwrite", "--seed", 3)).code == 130
    assert kit.snapshot(here) == before


def test_the_old_run_goes_after_the_first_step(kit, tiny, tune, here, run, monkeypatch):
    record = recorder.Recorder.push
    monkeypatch.setattr(recorder.Recorder, "push", lambda self, index, *rest: boom() if index == 3 else record(self, index, *rest))
    args = kit.basics(tiny, "--sample-prompt=", "--output-dir", "r", "--overwrite", "--seed", 3, "--max-steps", 4, "--save-steps", 1)
    assert tune("sft", *args).code == 130
    assert "seed: 3" in (run / "config.yaml").read_text()
    assert {path.name for path in run.iterdir()} == FILES


def test_what_failed_leaves_no_folder(kit, tiny, tune, here):
    kit.refused(tune("sft", *kit.basics(tiny, "--output-dir", "a/b/c", "--lora-target-modules", "qq")), "matches no parameter")
    kit.refused(tune("sft", *kit.basics(tiny, "--lora-target-modules", "qq")), "matches no parameter")
    assert list(here.iterdir()) == []


# Runs of the version before, which had no marker.


@pytest.fixture
def earlier(run) -> Path:
    (run / marker.NAME).unlink()
    return run


def test_a_run_of_the_version_before_resumes_and_is_marked(kit, tiny, tune, earlier):
    assert tune("sft", *kit.basics(tiny, "--output-dir", "r", "--max-steps", 3, "--resume", "auto")).code == 0
    assert marker.read(earlier).makes == ("adapter",) and marker.marked(earlier)


def test_a_run_of_the_version_before_is_replaced_with_the_same_care(kit, tiny, tune, here, earlier):
    text(earlier / "notes.md")
    before = kit.snapshot(here)
    args = kit.basics(tiny, "--output-dir", "r", "--overwrite")
    kit.refused(tune("sft", *args), "no run made r/notes.md")
    assert kit.snapshot(here) == before
    (earlier / "notes.md").unlink()
    assert tune("sft", *args).code == 0 and marker.marked(earlier)


def test_a_damaged_marker_neither_deletes_nor_blocks(kit, tiny, tune, run):
    for broken in ("", "{", "[]", '{"made_by": "treetune"}', '{"made_by": "treetune", "run": 1, "makes": 3, "format": 1}'):
        text(run / marker.NAME, broken)
        assert tune("sft", *kit.basics(tiny, "--output-dir", "r", "--max-steps", 3, "--resume", "auto")).code == 0
        assert json.loads((run / marker.NAME).read_text())["makes"] == ["adapter"]
    text(run / marker.NAME, json.dumps({"made_by": "treetune", "run": "x", "makes": [], "format": 99}))
    kit.refused(tune("sft", *kit.basics(tiny, "--output-dir", "r", "--resume", "auto")), "format 99.*later version")


# Several processes.


def test_a_run_in_use_is_refused_with_host_and_number(kit, tiny, tune, here, run):
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from treetune.core import lock; k = lock.Lock(Path('r'));"
         "print('held', flush=True); sys.stdin.read()"], cwd=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stdout.readline() == "held\n"
    before = kit.snapshot(here)
    for extra in (["--resume", "auto"], ["--overwrite"], ["--resume", "r/checkpoints/step_000002"]):
        done = tune("sft", *kit.basics(tiny, "--output-dir", "r", "--max-steps", 3, *extra))
        kit.refused(done, f"r is in use by process {child.pid} on {socket.gethostname()}")
    assert kit.snapshot(here) == before
    child.kill()
    child.communicate()
    assert (run / lock.NAME).exists()
    assert tune("sft", *kit.basics(tiny, "--output-dir", "r", "--max-steps", 3, "--resume", "auto")).code == 0
    assert not (run / lock.NAME).exists()


def test_runs_that_start_together_get_folders_of_their_own(tiny, here, kit):
    request = folder.Request("sft")
    with folder.hold(request) as one, folder.hold(request) as two:
        assert {one.root.name, two.root.name} == {"sft-001", "sft-002"}
    assert list(here.iterdir()) == []


DEAD = "0" * 8 + "-deadbeef-1-1-1-0"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [".config.yaml.4194305", ".step_000004.4194305", ".model.a1b2c3d4.part", ".report.html.4194305",
                                  f".metrics.jsonl.{DEAD}.draft", f".adapter.{DEAD}.draft", f".run.{DEAD}.gone"])  # fmt: skip
def test_drafts_block_nothing_and_go(name, kit, tiny, tune, here):
    place = here / "r" / ("checkpoints" if "step" in name else "") / name
    text(place / "file") if "part" in name or "step" in name else text(place)
    if "step" in name:
        shutil.rmtree(here / "r/checkpoints")
        text(here / "r" / name / "file")
    assert tune("sft", *kit.basics(tiny, "--output-dir", "r", "--sample-prompt=")).code == 0
    assert {path.name for path in (here / "r").iterdir()} == FILES | {"adapter"}


def test_a_draft_of_a_running_process_stays(kit, tiny, tune, run):
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from treetune.core import drafts;"
         "print(drafts.name(Path('merged')), flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    draft = run / child.stdout.readline().strip()
    text(draft / "file")
    assert tune("sft", *kit.basics(tiny, "--output-dir", "r", "--overwrite")).code == 0
    assert (draft / "file").read_text() == "mine"
    child.communicate("")
    assert tune("sft", *kit.basics(tiny, "--output-dir", "r", "--overwrite")).code == 0
    assert not draft.exists()


def test_a_checkpoint_that_stepped_aside_comes_back(kit, tiny, tune, run):
    for name in (drafts.name(run / "checkpoints/step_000002", drafts.OLD).name.replace(f"-{os.getpid()}-", "-4194305-"),
                 ".step_000002.old.4194305"):  # fmt: skip
        (run / "checkpoints/step_000002").rename(run / "checkpoints" / name)
        done = tune("sft", *kit.basics(tiny, "--output-dir", "r", "--max-steps", 2, "--resume", "auto"))
        assert done.code == 0 and "resumed from step_000002" in done.out


def test_sample_rows_are_part_of_the_package(here, monkeypatch):
    """As a wheel lays them out: `samples` beside `core`."""
    from treetune.cli.options.data import SAMPLES
    from treetune.core.data import samples

    source = Path(samples.__file__).resolve().parents[1]
    shutil.copytree(source, here / "treetune/core")
    shutil.copytree(source.parent / "examples/data", here / "treetune/samples")
    monkeypatch.setattr(samples, "__file__", str(here / "treetune/core/data/samples.py"))
    names = {Path(path).name for path in SAMPLES.values()} | {"text.jsonl", "gsm8k_test_sample.jsonl"}
    assert all(samples.path(name) == str(here / "treetune/samples" / name) and Path(samples.path(name)).is_file() for name in names)
    monkeypatch.undo()
    assert all(Path(samples.path(name)).is_file() for name in names), "from any working folder"
