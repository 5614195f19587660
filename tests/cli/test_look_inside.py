"""Profiles and logs of whole runs: what `profiler_steps` and `log_level` leave and print."""

import json
import re


def test_a_profile_of_a_run_is_in_its_folder_and_goes_with_it(sft, here, kit):
    done = sft("--max-steps", 4, "--profiler-steps", 2, "--profiler-steps-start", 1, "--output-dir", "run", "--sample-prompt=")
    assert done.code == 0 and "profile of steps 2 to 3: " in done.out
    text = (here / "run/profile_ops.txt").read_text()
    assert text.startswith("steps 2 to 3 on cpu: ") and "aten::mm" in text
    assert json.loads((here / "run/profile_trace.json").read_text())["traceEvents"]
    again = sft("--max-steps", 2, "--output-dir", "run", "--overwrite", "--sample-prompt=")
    assert again.code == 0 and not (here / "run/profile_ops.txt").exists(), "it is of the run, and goes when that is overwritten"


def test_a_profile_that_never_begins_is_told(sft, here, kit):
    done = sft("--profiler-steps", 1, "--profiler-steps-start", 5)
    assert done.code == 0 and "! there is no profile: its first step is 6, and the run has 2" in done.out
    kit.refused(sft("--profiler-steps-start", 5), "there are no profiler_steps")
    kit.refused(sft("--profiler-steps", 1, 2, "--profiler-steps-start", 5), "names the steps themselves")


def logged(root, level):
    return re.findall(rf"^\S+ \S+ {level} +(.*)$", (root / "run.log").read_text(), re.M) if (root / "run.log").exists() else []


def test_debug_logs_versions_options_times_and_all_numbers(sft, here):
    done = sft("--log-level", "debug", "--output-dir", "run", "--sample-prompt=")
    lines = logged(here / "run", "debug")
    assert done.code == 0 and all(line in done.out for line in ("option lora_r: 4", "step 1: its micro-batches took"))
    assert any(line.startswith("torch: ") for line in lines) and "option lora_r: 4" in lines
    assert sum("grad_norm" in line for line in lines) == 2 and sum("eval/loss" in line for line in lines) == 2
    assert "evaluating what is held out ..." in lines


def test_a_level_leaves_out_what_is_below_it(sft, here):
    quiet = sft("--log-level", "warning", "--output-dir", "run", "--sample-prompt=", "--save-steps", 50)
    assert quiet.code == 0 and quiet.err == ""
    assert quiet.out.count("\n") == 1 and quiet.out.startswith("! ") and "save_steps" in quiet.out
    assert logged(here / "run", "info") == [] and len(logged(here / "run", "warning")) == 1
    silent = sft("--log-level", "error", "--output-dir", "other", "--sample-prompt=", "--save-steps", 50)
    assert (silent.code, silent.out, silent.err) == (0, "", "") and logged(here / "other", "warning") == []
