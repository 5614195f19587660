"""Runs that are killed before each thing that they do to the disk: the folder that they leave always resumes, and always starts anew."""

import os
import shutil
import signal
import sys

import pytest

from treetune.core.run import marker

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
SHORT = ["--sample-prompt=", "--max-steps", 2, "--save-steps", 1, "--save-total-limit", 1, "--output-dir", "r"]


def writes(event: str, args: tuple) -> bool:
    """Whether an audited event is about to change something in the run folder."""
    if event == "open":
        changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(changes) and "/r/" in f"/{os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else ''}"
    return event in CHANGES and any("/r/" in f"/{os.fsdecode(one)}/" for one in args[:2] if isinstance(one, str | bytes | os.PathLike))


def die_before(number: int):
    """Die before the change of this number; the process says when there was none."""

    def prepare():
        left = [number]

        def hook(event, args):
            if event in CHANGES or event == "open":
                if writes(event, args):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return prepare


STARTS = {
    "new": ([], []),
    "overwrite": (SHORT, ["--overwrite"]),
    "resume": ([*SHORT, "--max-steps", 1], ["--resume", "auto"]),
    "back": ([*SHORT, "--save-total-limit", 9], ["--resume", "r/checkpoints/step_000001"]),
}


def last(args: list) -> list:
    """The arguments with the last value of each option."""
    pairs, i = {}, 0
    while i < len(args):
        alone = i + 1 == len(args) or str(args[i + 1]).startswith("--")
        pairs[args[i]] = [] if alone else [args[i + 1]]
        i += 1 if alone else 2
    return [part for name, value in pairs.items() for part in (name, *value)]


def check_after(kit, tiny, tune, here, before, first):
    """Both ways on from a killed run end well: to go on, and to start anew."""
    shutil.copytree(here / "r", here / "copy/r", symlinks=True) if (here / "r").exists() else None
    on = tune("sft", *kit.basics(tiny, *last([*SHORT, "--resume", "auto"])))
    if "would have no effect" in on.err:  # the run that was there before is at its end, under the options that it began with
        on = tune("sft", *kit.basics(tiny, *last([*first, "--resume", "auto"])))
    assert on.code == 0, (on, before)
    assert kit.state(here / "r", 2) and not list((here / "r").glob("**/.*.draft")), kit.listing(here / "r")
    assert {path.name for path in (here / "r").iterdir() if path.name.startswith(".")} == {marker.NAME}
    shutil.rmtree(here / "r")
    if (here / "copy/r").exists():
        (here / "copy/r").rename(here / "r")
    anew = tune("sft", *kit.basics(tiny, *last([*SHORT, "--overwrite"])))
    assert anew.code == 0, (anew, before)


def killed_everywhere(kit, tiny, tune, forked, here, kind, stride):
    first, then = STARTS[kind]
    if first:
        assert tune("sft", *kit.basics(tiny, *last(first))).code == 0
        shutil.copytree(here / "r", here / "start")
    number, code = stride - 1, -signal.SIGKILL
    while code == -signal.SIGKILL:
        for name in ("r", "copy"):
            shutil.rmtree(here / name, ignore_errors=True)
        if first:
            shutil.copytree(here / "start", here / "r")
        code = forked(die_before(number), "sft", *kit.basics(tiny, *last([*SHORT, *then]))).code
        assert code in (0, -signal.SIGKILL)
        check_after(kit, tiny, tune, here, number, first)
        number += stride
    return number


@pytest.mark.slow
@pytest.mark.parametrize("kind", STARTS)
def test_a_kill_before_any_change_leaves_a_folder_that_resumes_and_starts(kind, kit, tiny, tune, forked, here):
    assert killed_everywhere(kit, tiny, tune, forked, here, kind, 1) > 40


@pytest.mark.parametrize("kind", [pytest.param("new", marks=pytest.mark.slow), "overwrite"])
def test_a_kill_before_some_changes_leaves_a_folder_that_resumes_and_starts(kind, kit, tiny, tune, forked, here):
    assert killed_everywhere(kit, tiny, tune, forked, here, kind, 23) > 23
