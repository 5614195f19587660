"""Options of trackers and runs that trackers follow: what each option gives a tracker, refusals, keys that stay secret, resuming.

What trackers call of their packages is tested in tests/core/trackers, the packages themselves in test_trackers_real.py.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from treetune.cli import invocation, trackers
from treetune.cli.methods.sft import Sft
from treetune.cli.options import trackers as options_
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config import table

ON = {name: "on" for name in ("use_wandb", "use_mlflow", "use_comet", "use_trackio", "use_swanlab")}
# option -> (tracker, another value); what the tracker is given changes with each.
GIVEN = {
    "wandb_project": ("wandb", "p"), "wandb_entity": ("wandb", "e"), "wandb_name": ("wandb", "n"), "wandb_run_id": ("wandb", "i"),
    "wandb_mode": ("wandb", "offline"), "wandb_log_model": ("wandb", "end"), "mlflow_tracking_uri": ("mlflow", "u"),
    "mlflow_experiment_name": ("mlflow", "e"), "mlflow_run_name": ("mlflow", "n"), "hf_mlflow_log_artifacts": ("mlflow", True),
    "comet_api_key": ("comet", "k"), "comet_workspace": ("comet", "w"), "comet_project_name": ("comet", "p"),
    "comet_experiment_key": ("comet", "k" * 32), "comet_mode": ("comet", "create"), "comet_online": ("comet", False),
    "comet_experiment_config": ("comet", ("log_code=true",)), "trackio_project_name": ("trackio", "p"),
    "trackio_run_name": ("trackio", "n"), "trackio_space_id": ("trackio", "me/s"), "swanlab_project": ("swanlab", "p"),
    "swanlab_workspace": ("swanlab", "w"), "swanlab_experiment_name": ("swanlab", "n"), "swanlab_mode": ("swanlab", "local"),
    "swanlab_api_key": ("swanlab", "k"), "swanlab_description": ("swanlab", "d"),
}  # fmt: skip
OTHERS = {*ON, "use_tensorboard", "wandb_watch", "tracker_timeout"}


def given(**options) -> dict:
    return {one.name: one for one in trackers.services(TrackerOptions(**options))}


@pytest.mark.parametrize("name", GIVEN)
def test_option_changes_what_its_tracker_is_given(name):
    tracker, value = GIVEN[name]
    plain, changed = given(**ON), given(**ON, **{name: value})
    assert plain[tracker] != changed[tracker]
    assert {other: one for other, one in plain.items() if other != tracker} == {
        other: one for other, one in changed.items() if other != tracker
    }


def test_there_is_a_row_for_every_option():
    assert set(GIVEN) | OTHERS == set(vars(TrackerOptions()))


@pytest.mark.parametrize("tracker", options_.NAMED_BY)
def test_a_name_of_a_project_turns_its_tracker_on_and_use_says_so_or_not(tracker):
    named = {options_.NAMED_BY[tracker]: "sums"}
    assert list(given(**named)) == list(given(**{f"use_{tracker}": "on"})) == [tracker]
    assert given() == given(**named, **{f"use_{tracker}": "off"}) == {}
    assert options_.NAMED_BY[tracker] not in table.unused(Sft(tracking=TrackerOptions(**named)))


def test_disabled_is_off():
    assert given(wandb_project="p", wandb_mode="disabled") == given(swanlab_project="p", swanlab_mode="disabled") == {}
    assert list(given(use_tensorboard=True)) == ["tensorboard"]


def test_what_is_not_there_contradicts_itself_or_would_be_ignored_is_refused(kit, sft, here):
    for args, words in [
        (["--wandb-project", "p", "--wandb-watch", "gradients"], "wandb_watch is gradients: histograms .* are not there"),
        (["--use-comet", "--comet-mode", "get"], "give comet_experiment_key"),
        (["--use-comet", "--comet-experiment-key", "short"], "must be 32 to 50 letters and digits, got 'short'"),
        (["--wandb-name", "n"], "--wandb-name would be ignored: wandb is not on: give wandb_project, or use_wandb"),
        (["--comet-api-key", "k-e-y"], "--comet-api-key would be ignored: comet is not on"),
        (["--tracker-timeout", "5"], "--tracker-timeout would be ignored: no tracker is on"),
        (["--tracker-timeout", "0", "--use-tensorboard"], "tracker_timeout must be a number above 0"),
    ]:
        kit.refused(sft(*args), words)
    assert kit.listing(here) == set()


@pytest.mark.parametrize("tracker", options_.MODULES)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(tracker, kit, sft, here, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == options_.MODULES[tracker] else find(name, *more))
    done = sft(f"--use-{tracker}")
    kit.refused(done, rf"use_{tracker} needs the package {options_.MODULES[tracker]}.*: pip install 'treetune\[{tracker}\]'")
    assert kit.listing(here) == set() and done.out == ""


def test_a_folder_that_is_called_like_a_package_is_none(kit, sft, here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setitem(options_.MODULES, "swanlab", "swanlab_logs")
    (here / "swanlab_logs").mkdir()
    kit.refused(sft("--use-swanlab"), "needs the package swanlab_logs, which is not installed")


def test_the_extras_that_errors_name_are_there():
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(options_.MODULES) <= set(extras)


# --- runs, with stubs of the packages


@pytest.fixture
def stub(tmp_path_factory, monkeypatch):
    """stub(name) puts the stub of a package in the way; stub.calls(names) gives what was called."""
    place = Path(__file__).parents[1] / "core/trackers/conftest.py"
    spec = importlib.util.spec_from_file_location("tracker_stubs", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("packages")
    (folder / "stub_calls.py").write_text(module.LOG)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("TRACKER_CALLS", str(folder / "calls.jsonl"))

    def put(name: str, old: str = "", new: str = "") -> None:
        (folder / f"{name}.py").write_text(module.STUBS[name].replace(old, new) if old else module.STUBS[name])

    def calls(*names: str) -> list:
        calls = map(json.loads, (folder / "calls.jsonl").read_text().splitlines())
        return [one for one in calls if one[0] in names]

    put.calls = calls
    return put


def told(stub) -> list[dict]:
    return [{"step": named["step"]} | args[0] for _, args, named in stub.calls("log", "log_metrics")]


def test_a_run_that_is_killed_and_resumed_is_one_run_of_the_tracker(kit, tiny, here, tune, forked, stub):
    stub("wandb")
    args = ["--sample-prompt=", "--max-steps", 5, "--eval-steps", 2, "--save-steps", 2, "--output-dir", "run", "--wandb-project", "sums"]
    assert forked(kit.die_at(4), "sft", *kit.basics(tiny, *args)).code == -9
    done = tune("sft", *kit.basics(tiny, *args, "--resume", "auto"))
    assert done.code == 0 and "wandb: wandb sync wandb/offline-run-1" in done.out, done.err
    rows, records = told(stub), kit.metrics(here / "run")
    assert kit.timeless(rows) == kit.timeless(records)
    first, second = (named for _, _, named in stub.calls("init"))
    assert first["id"] == second["id"] and first["name"] == "run" and first["config"]["max_steps"] == 5
    assert [args for _, args, _ in stub.calls("finish")] == [[1], [0]], "that of the killed run ended as killed"
    (summary,) = (args[0] for _, args, _ in stub.calls("summary.update") if "done" in args[0])
    assert summary["best/checkpoint"] == json.loads((here / "run/best.json").read_text())["checkpoint"]


def test_models_are_uploaded_where_it_is_asked_for(kit, sft, here, stub):
    stub("wandb")
    args = ("--sample-prompt=", "--save-steps", 1, "--wandb-project", "sums")
    for name, more in (("none", ()), ("end", ("--wandb-log-model",)), ("all", ("--wandb-log-model", "checkpoint"))):
        assert sft(*args, "--output-dir", name, *more).code == 0
    folders = [args[0] for _, args, _ in stub.calls("add_dir")]
    assert folders == ["end/adapter", "all/checkpoints/step_000001", "all/checkpoints/step_000002", "all/adapter"]


def test_a_tracker_that_fails_costs_a_warning(kit, tiny, here, sft, stub):
    stub("wandb", 'call("log", values, step=step)', 'raise OSError("no network")')
    done = sft("--sample-prompt=", "--wandb-project", "sums", "--output-dir", "run")
    assert done.code == 0 and (here / "run/adapter").is_dir()
    warnings = [line for line in done.out.splitlines() if "! tracker" in line]
    assert len(warnings) == 1 and "tracker wandb failed (numbers): OSError: no network" in " ".join(done.out.split())


def test_keys_are_given_to_the_tracker_and_written_nowhere(kit, tiny, here, tune, stub):
    stub("comet_ml")
    (here / "run.yaml").write_text(yaml.safe_dump({"comet_api_key": "k-e-y-1", "comet_project_name": "sums", "save_steps": 1}))
    done = tune("sft", *kit.basics(tiny, "--config", "run.yaml", "--output-dir", "run", "--sample-prompt="))
    assert done.code == 0, done.err
    assert stub.calls("start")[0][2]["api_key"] == "k-e-y-1"
    assert not any("comet_api_key" in args[0] for _, args, _ in stub.calls("log_parameters"))
    assert "k-e-y-1" not in done.out + done.err
    written = {name: data for name, data in kit.snapshot(here / "run").items() if isinstance(data, bytes)}
    assert len(written) > 8 and not [name for name, data in written.items() if b"k-e-y-1" in data]
    more = ("--max-steps", 3, "--sample-prompt=", "--comet-api-key", "k-e-y-2")
    again = tune("sft", *kit.basics(tiny, "--config", "run/config.yaml", "--resume", "auto", *more))
    assert again.code == 0 and "k-e-y" not in again.out + again.err and "comet_api_key" not in again.out, again.err
    assert stub.calls("start")[1][2]["api_key"] == "k-e-y-2" and stub.calls("start")[1][2]["mode"] == "get"


def test_the_command_that_continues_a_run_has_no_key():
    invocation.remember("sft", ["--comet-api-key", "k-e-y", "--swanlab-api-key=k-e-y", "--use-comet", "--max-steps", "3"])
    line = invocation.continuation(Path("run"), overwrite=False, secrets=table.secrets(Sft))
    assert line.endswith("sft --use-comet --max-steps 3 --output-dir run --resume auto")


def test_the_events_of_tensorboard_go_with_the_run_that_is_overwritten(kit, tiny, here, tune):
    pytest.importorskip("tensorboard")
    args = kit.basics(tiny, "--sample-prompt=", "--max-steps", 1, "--output-dir", "run", "--use-tensorboard")
    assert tune("sft", *args).code == 0
    (old,) = (here / "run/tensorboard").iterdir()
    assert tune("sft", *args, "--overwrite").code == 0
    (new,) = (here / "run/tensorboard").iterdir()
    assert new.name != old.name
    (here / "run/tensorboard/mine.txt").write_text("kept")
    kit.refused(tune("sft", *args, "--overwrite"), "no run made run/tensorboard/mine.txt")
