"""What each tracker calls of its package, by stubs of the packages; TensorBoard itself, since it is small."""

import importlib
import json

import numpy as np
import pytest


def follow(followed, chosen) -> None:
    """Three steps with evaluations, then a process that goes on with a fourth."""
    trackers = followed.open(chosen)
    followed.evaluation(trackers, 0)
    for step in (1, 2, 3):
        followed.step(trackers, step)
    followed.end(trackers)
    trackers = followed.open(chosen, 3)
    followed.step(trackers, 4)
    followed.end(trackers, "failed: no memory")
    assert followed.warnings == []


def numbers(calls) -> list[tuple[int, dict]]:
    return [(named["step"], args[0]) for _, args, named in calls]


TOLD = [
    (0, {"eval/loss": 2.0, "eval/seconds": 0.5}), (1, {"train/loss": 1.0}), (2, {"train/loss": 0.5}), (3, {"train/loss": 1 / 3}),
    (4, {"train/loss": 0.25}),
]  # fmt: skip


def test_wandb(stubs, followed, services):
    stubs("wandb")
    (followed.root / "adapter").mkdir()
    chosen = services(wandb_project="sums", wandb_entity="me", wandb_name="one", wandb_mode="offline", wandb_log_model="end")
    follow(followed, chosen)
    first, second = (named for _, _, named in stubs.calls("init"))
    assert first["id"] == second["id"] == followed.id and first["resume"] == second["resume"] == "allow"
    assert (first["project"], first["entity"], first["name"], first["mode"]) == ("sums", "me", "one", "offline")
    assert first["config"]["lora_r"] == 4 and first["settings"]["disable_git"] and first["settings"]["disable_code"]
    assert numbers(stubs.calls("log")) == TOLD
    assert [args for _, args, _ in stubs.calls("finish")] == [[0], [1]]
    assert stubs.calls("summary.update")[0][1][0]["done"] == "all" and not stubs.calls("Artifact")
    trackers = followed.open(chosen, 4)
    trackers[0].saved(followed.root / "adapter", None)
    followed.end(trackers)
    assert [args for _, args, _ in stubs.calls("add_dir")] == [[str(followed.root / "adapter")]]
    assert stubs.calls("log_artifact")[0][1][1] == ["latest", "adapter"]


def test_a_wandb_run_of_the_users_own(stubs, followed, services):
    stubs("wandb")
    followed.end(followed.open(services(use_wandb="on", wandb_run_id="mine")))
    assert stubs.calls("init")[0][2]["id"] == "mine"
    followed.end(followed.open(services(use_wandb="on")))
    assert stubs.calls("init")[1][2]["id"] == "mine", "a resumed run goes on with it"


def test_mlflow(stubs, followed, services):
    stubs("mlflow")
    follow(followed, services(mlflow_experiment_name="sums", mlflow_tracking_uri="http://me:pass@host", mlflow_run_name="one"))
    assert stubs.calls("MlflowClient")[0][1] == ["http://me:pass@host"] and "pass" not in str(followed.lines)
    assert [args for _, args, _ in stubs.calls("create_run")] == [["7", "one", {"treetune.run": followed.id}]]
    assert [args for _, args, _ in stubs.calls("update_run")] == [["given-by-mlflow", "RUNNING"]] * 2
    batches = [named for _, _, named in stubs.calls("log_batch")]
    told = [{"step": one["metrics"][0][3]} | {key: value for _, key, value, _ in one["metrics"]} for one in batches if one["metrics"]]
    assert told == [{"step": step} | values for step, values in TOLD]
    params = {key: value for one in batches for _, key, value in one["params"]}
    tags = {key: value for one in batches for _, key, value in one["tags"]}
    assert params["data"] == "a.jsonl b.jsonl" and "lora_r" not in params and tags["option.lora_r"] == "4" and tags["done"] == "all"
    assert [args[1] for _, args, _ in stubs.calls("set_terminated")] == ["FINISHED", "FAILED"]


def test_comet(stubs, followed, services):
    stubs("comet_ml")
    options = {"comet_mode": "create", "comet_online": False, "comet_experiment_config": ("log_code=true",)}
    follow(followed, services(comet_project_name="sums", comet_api_key="k", **options))
    first, second = (named for _, _, named in stubs.calls("start"))
    assert first["experiment_key"] == second["experiment_key"] == followed.id and (first["mode"], second["mode"]) == ("create", "get")
    assert first["api_key"] == "k" and first["online"] is False and first["project_name"] == "sums"
    config = first["experiment_config"]
    assert config["log_code"] is True and config["log_git_patch"] is False and config["name"] == "run"
    assert numbers(stubs.calls("log_metrics")) == TOLD and len(stubs.calls("end")) == 2


def test_trackio(stubs, followed, services):
    stubs("trackio")
    follow(followed, services(trackio_project_name="sums"))
    first, second = (named for _, _, named in stubs.calls("init"))
    assert first["name"] == second["name"] == f"run-{followed.id[:6]}" and (first["resume"], second["resume"]) == ("never", "allow")
    assert first["space_id"] is None and numbers(stubs.calls("log")) == TOLD and len(stubs.calls("finish")) == 2


def test_swanlab(stubs, followed, services):
    stubs("swanlab")
    follow(followed, services(swanlab_project="sums", swanlab_mode="cloud", swanlab_api_key="k"))
    assert stubs.calls("login")[0][2] == {"api_key": "k", "save": False}
    first, second = (named for _, _, named in stubs.calls("init"))
    assert first["id"] == second["id"] == followed.id and first["mode"] == "online" and first["settings"]["interactive"] is False
    assert numbers(stubs.calls("log")) == TOLD and [args for _, args, _ in stubs.calls("finish")] == [["success"], ["crashed"]]


def test_tensorboard(followed, services):
    pytest.importorskip("tensorboard")
    chosen = services(use_tensorboard=True)
    follow(followed, chosen)
    trackers = followed.open(chosen, 2)  # steps 3 and 4 again, with other numbers
    for step in (3, 4, 5):
        followed.step(trackers, step, grad_norm=0.1 * step)
    followed.end(trackers)
    read = importlib.import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = read(str(followed.root / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(step, np.float32(1 / step)) for step in (1, 2, 3, 4, 5)]
    assert [one.step for one in events.Scalars("grad_norm")] == [3, 4, 5]
    assert [(one.step, one.value) for one in events.Scalars("eval/loss")] == [(0, 2.0)]
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in ("options", "done")}
    assert "| lora_r | 4 |" in texts["options"] and texts["done"] == "all"


ANSWERED = [{"step": 2, "row": row, "prompt": f"p{row}", "answer": "<a|\nb>", "tokens": 3, "stopped": True} for row in (4, 9)]
COLUMNS, ROWS = ["row", "prompt", "reference", "answer", "tokens"], [[row, f"p{row}", None, "<a|\nb>", 3] for row in (4, 9)]
MARKDOWN = (
    "| row | prompt | reference | answer | tokens |\n|---|---|---|---|---|\n"
    "| 4 | p4 |  | &lt;a&#124;<br>b> | 3 |\n| 9 | p9 |  | &lt;a&#124;<br>b> | 3 |"
)
TABLE = {"columns": COLUMNS, "data": ROWS}


@pytest.mark.parametrize(
    ("package", "options", "call", "expected"),
    [
        ("wandb", {"use_wandb": "on"}, "log", [[{"eval/answers": TABLE}], {"step": 2}]),
        ("trackio", {"use_trackio": "on"}, "log", [[{"eval/answers": TABLE}], {"step": 2}]),
        ("swanlab", {"use_swanlab": "on"}, "log", [[{"eval/answers": MARKDOWN}], {"step": 2}]),
        ("comet_ml", {"use_comet": "on"}, "log_table", [["answers_step_000002.csv", ROWS], {"headers": COLUMNS}]),
        (
            "mlflow", {"use_mlflow": "on"}, "log_table",
            [["given-by-mlflow", {name: [row[i] for row in ROWS] for i, name in enumerate(COLUMNS)}, "answers/step_000002.json"], {}],
        ),
    ],
)  # fmt: skip
def test_answers_to_held_out_prompts_are_a_table_that_is_told_once(package, options, call, expected, stubs, followed, services):
    stubs(package)
    trackers = followed.open(services(**options))
    trackers[0].samples([{"step": 0, "prompt": "p", "answer": "a sample answer"}])
    trackers[0].samples(ANSWERED)
    followed.end(trackers)
    (followed.root / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ANSWERED))
    trackers = followed.open(services(**options), 2)  # a process that goes on
    followed.end(trackers)
    assert [list(one[1:]) for one in stubs.calls(call)] == [expected] and followed.warnings == []


def test_answers_that_a_tracker_missed_are_told_with_the_numbers_of_their_step(stubs, followed, services):
    stubs("wandb")
    (followed.root / "samples.jsonl").write_text("".join(json.dumps(one | {"step": 0}) + "\n" for one in ANSWERED))
    trackers = followed.open(services(use_wandb="off"))
    followed.evaluation(trackers, 0)
    followed.step(trackers, 1)
    followed.end(trackers)
    followed.end(followed.open(services(use_wandb="on"), 1))
    assert [(named["step"], [*args[0]][0]) for _, args, named in stubs.calls("log")] == [
        (0, "eval/loss"), (0, "eval/answers"), (1, "train/loss")
    ]  # fmt: skip
