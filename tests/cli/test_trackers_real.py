"""Trackers against their real packages, offline: the numbers of metrics.jsonl, one run for a run that is killed and resumed, no step twice.

Each test is skipped where its package is not installed: `make test-trackers` installs and runs them all.
"""

import importlib
import json
import math
import sqlite3
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow
KEY = "0123456789abcdef" * 2


def wandb_rows(here: Path):
    """(id, step, name, value) of the history in offline folders: LevelDB records of 32 KiB blocks with protocol buffers."""
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for path in sorted(here.glob("wandb/offline-run-*/*.wandb")):
        records = [proto.Record.FromString(data) for data in leveldb(path.read_bytes())]
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert json.loads({item.key: item.value_json for item in run.config.update}["lora_r"]) == 4
        for record in records:
            for item in record.history.item if record.WhichOneof("record_type") == "history" else ():
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    yield run.run_id, record.history.step.num, name, json.loads(item.value_json)


def leveldb(data: bytes):
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def tensorboard_rows(here: Path):
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events_of_run = events.EventAccumulator(str(here / "run/tensorboard"), size_guidance={"scalars": 0})
    events_of_run.Reload()
    for tag in events_of_run.Tags()["scalars"]:
        for event in events_of_run.Scalars(tag):
            yield "run", event.step, tag, event.value


def mlflow_rows(here: Path):
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=str(here / "mlruns"))
    (run,) = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["lora_r"] == "4" and run.data.tags["best/checkpoint"].startswith("step_")
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            yield run.info.run_id, metric.step, name, metric.value


def comet_rows(here: Path):
    for path in sorted((here / "comet").glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("experiment.json"))
            messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        params = {one["payload"]["param"]["paramName"]: one["payload"]["param"] for one in messages if one["type"] == "parameter_msg"}
        assert params["lora_r"]["paramValue"] == 4 and not {"comet_api_key", "sys.argv"} & params.keys()
        for one in messages:
            metric = one["payload"].get("metric")
            if metric and metric["metricName"] != "process duration" and not metric["metricName"].startswith("sys."):
                yield about["offline_id"], metric["step"], metric["metricName"], metric["metricValue"]


def trackio_rows(here: Path):
    with sqlite3.connect(here / "trackio/sums.db") as base:
        rows = base.execute("select run_id, step, metrics from metrics").fetchall()
        (config,) = base.execute("select config from configs").fetchone()
    assert json.loads(config)["lora_r"] == 4
    for run, step, text in rows:
        for name, value in json.loads(text).items():
            yield run, step, name, value


def swanlab_rows(here: Path):
    store = importlib.import_module("swanlab.sdk.internal.core_python.store")
    proto = importlib.import_module("swanlab.proto.swanlab.record.v1.record_pb2")
    for path in sorted(here.glob("swanlog/run-*/*.swanlab")):
        reader = store.DataStoreReader()
        reader.open(path)
        records = [proto.Record.FromString(data) for data in iter(reader.scan, None)]
        (run,) = [record.start for record in records if record.HasField("start")]
        for record in records:
            if record.HasField("scalar") and not record.scalar.key.startswith("__"):
                yield run.id, record.scalar.step, record.scalar.key, record.scalar.value.number


TRACKERS = {
    "wandb": (["--wandb-project", "sums", "--wandb-mode", "offline"], wandb_rows),
    "tensorboard": (["--use-tensorboard"], tensorboard_rows),
    "mlflow": (["--mlflow-experiment-name", "sums", "--mlflow-tracking-uri", "mlruns"], mlflow_rows),
    "comet_ml": (
        ["--comet-project-name", "sums", "--no-comet-online", "--comet-experiment-config", "offline_directory=comet"], comet_rows,
    ),
    "trackio": (["--trackio-project-name", "sums"], trackio_rows),
    "swanlab": (["--swanlab-project", "sums", "--swanlab-mode", "offline"], swanlab_rows),
}  # fmt: skip


def expected(kit, root: Path) -> dict:
    """(step, name) -> value of metrics.jsonl."""
    return {(int(record["step"]), name): value for record in kit.metrics(root) for name, value in record.items() if name != "step"}


@pytest.mark.parametrize("package", TRACKERS)
def test_a_run_that_is_killed_and_resumed_is_one_run_with_the_numbers_of_metrics_jsonl(package, kit, tiny, here, tune, forked, monkeypatch):
    pytest.importorskip(package, reason=f"{package} is not installed: make test-trackers")
    monkeypatch.setenv("TRACKIO_DIR", str(here / "trackio"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    options, read = TRACKERS[package]
    every = ("--sample-prompt=", "--max-steps", 6, "--eval-steps", 2, "--save-steps", 2, "--output-dir", "run")
    args = ["sft", *kit.basics(tiny, *every), *options]
    killed = forked(kit.die_at(5), *args)
    assert killed.code == -9, killed
    done = tune(*args, "--resume", "auto")
    assert done.code == 0 and "! tracker" not in done.out + done.err, done
    rows = [row for row in read(here) if row[2] != "step"]
    assert len({run for run, *_ in rows}) == 1, "one run, whatever the process"
    places = [(step, name) for _, step, name, _ in rows]
    assert len(set(places)) == len(places), "no step twice"
    values = {(step, name): value for _, step, name, value in rows}
    for (step, name), value in expected(kit, here / "run").items():
        if name in kit.TIMES and step == 5:
            continue  # told by the process that was killed
        assert values[step, name] == (np.float32(value) if package == "tensorboard" else value) or math.isnan(value), (step, name)
