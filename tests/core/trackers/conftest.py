"""A run folder that trackers follow without training, and stubs of their packages that note every call."""

import json
from pathlib import Path

import pytest

LOG = """
import json, os

def call(name, /, *args, **named):
    with open(os.environ["TRACKER_CALLS"], "a") as file:
        file.write(json.dumps([name, args, named], default=str) + "\\n")
"""
STUBS = {
    "wandb": """
from stub_calls import call

class Settings:
    def __init__(self, **named):
        self.named = named

class Summary:
    def update(self, values):
        call("summary.update", values)

def Table(columns, data):
    return {"columns": columns, "data": data}

class Artifact:
    def __init__(self, name, **named):
        call("Artifact", name, **named)
        self.name = name

    def add_dir(self, path):
        call("add_dir", path)

class Run:
    def __init__(self, id):
        self.id, self.url, self.dir, self.summary = id, None, "wandb/offline-run-1/files", Summary()

    def log(self, values, step):
        call("log", values, step=step)

    def log_artifact(self, artifact, aliases):
        call("log_artifact", artifact.name, aliases)

    def finish(self, exit_code):
        call("finish", exit_code)

def init(*, settings, **named):
    call("init", settings=settings.named, **named)
    return Run(named["id"])
""",
    "comet_ml": """
from stub_calls import call

class Experiment:
    url = "https://comet.test/x"

    def __init__(self, key):
        self.key = key

    def get_key(self):
        return self.key

    def end(self):
        call("end")

def _noted(name):
    return lambda self, values, **named: call(name, values, **named)

Experiment.log_table = lambda self, name, rows, headers: call("log_table", name, rows, headers=headers)
for name in ("log_parameters", "log_metrics", "log_others"):
    setattr(Experiment, name, _noted(name))

def ExperimentConfig(**named):
    return named

def start(**named):
    call("start", **named)
    return Experiment(named["experiment_key"])
""",
    "trackio": """
from stub_calls import call

def Table(columns, data):
    return {"columns": columns, "data": data}

class Run:
    def log(self, values, step):
        call("log", values, step=step)

    def finish(self):
        call("finish")

def init(**named):
    call("init", **named)
    return Run()
""",
    "swanlab": """
from stub_calls import call

class Settings:
    def __init__(self, **named):
        self.named = named

    Probe = Terminal = dict

class Config:
    def update(self, values):
        call("config.update", values)

class Run:
    def __init__(self, id):
        self.id, self.config = id, Config()

    @property
    def url(self):
        raise ValueError("not online")

    def log(self, values, step):
        call("log", values, step=step)

    def finish(self, state):
        call("finish", state)

def Text(content):
    return content

def login(**named):
    call("login", **named)

def init(*, settings, **named):
    call("init", settings=settings.named, **named)
    return Run(named["id"])
""",
    "mlflow": """
import types
from stub_calls import call

entities = types.ModuleType("mlflow.entities")
entities.Metric = lambda key, value, timestamp, step: ["metric", key, value, step]
entities.Param = lambda key, value: ["param", key, value]
entities.RunTag = lambda key, value: ["tag", key, value]
import sys
sys.modules["mlflow.entities"] = entities
__path__ = []

class Found:
    def __init__(self, **named):
        self.__dict__.update(named)

class MlflowClient:
    def __init__(self, tracking_uri):
        call("MlflowClient", tracking_uri)

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        call("create_experiment", name)
        return "7"

    def search_runs(self, experiments, filter_string, max_results):
        call("search_runs", experiments, filter_string)
        return []

    def create_run(self, experiment, run_name, tags):
        call("create_run", experiment, run_name, tags)
        return Found(info=Found(run_id="given-by-mlflow"))

    def get_run(self, id):
        return Found(data=Found(params={"lora_r": "8"}))

    def update_run(self, id, status):
        call("update_run", id, status)

    def log_batch(self, id, metrics=(), params=(), tags=()):
        call("log_batch", id, metrics=metrics, params=params, tags=tags)

    def log_artifacts(self, id, path, artifact_path):
        call("log_artifacts", id, path, artifact_path)

    def log_table(self, id, data, artifact_file):
        call("log_table", id, data, artifact_file)

    def set_terminated(self, id, status):
        call("set_terminated", id, status)

def get_tracking_uri():
    return "sqlite:///mlflow.db"
""",
}


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """stubs(name, text) puts a package in the way, and stubs.calls() gives what was called: [name, args, named]."""
    folder, log = tmp_path / "packages", tmp_path / "calls.jsonl"
    folder.mkdir()
    (folder / "stub_calls.py").write_text(LOG)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("TRACKER_CALLS", str(log))

    def place(name: str, text: str | None = None) -> None:
        (folder / f"{name}.py").write_text(STUBS[name] if text is None else text)

    def calls(*names: str) -> list:
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [one for one in calls if not names or one[0] in names]

    place.calls = calls
    return place


class Followed:
    """A run that trackers follow: a folder with a marker, records, and what was said."""

    def __init__(self, root: Path):
        from treetune.core.run import marker

        self.root, self.lines, self.warnings = root, [], []
        root.mkdir(exist_ok=True)
        if marker.read(root) is None:
            marker.write(root, marker.new(("adapter",)))

    @property
    def id(self) -> str:
        from treetune.core.run import marker

        return marker.read(self.root).run

    def open(self, services: list, step: int = 0, *, timeout_s: float = 60.0) -> list:
        """Trackers of a process that begins or goes on after a step."""
        from treetune.core.trackers.background import Background
        from treetune.core.trackers.told import Book

        book, config = Book(self.root), {"lora_r": 4, "data": ["a.jsonl", "b.jsonl"], "resume": None, "learning_rate": 1e-4}
        trackers = [Background(one, self.root, config, book, timeout_s=timeout_s) for one in services]
        for one in trackers:
            one.say = lambda text, warning: (self.warnings if warning else self.lines).append(text)
            one.start(9, step, {"model": "tiny"})
        return trackers

    def step(self, trackers: list, step: int, **values: float) -> None:
        """A step as the loop tells it: into metrics.jsonl first."""
        self._record(trackers, "step", {"step": step, "train/loss": 1 / step, **values})

    def evaluation(self, trackers: list, step: int) -> None:
        self._record(trackers, "evaluation", {"step": step, "eval/loss": 2 / (step + 1), "eval/seconds": 0.5})

    def _record(self, trackers: list, event: str, record: dict) -> None:
        from treetune.core import records

        records.append(self.root / "metrics.jsonl", record)
        for one in trackers:
            getattr(one, event)(record)

    def end(self, trackers: list, stopped: str | None = None) -> None:
        from treetune.core.trackers import background

        for one in trackers:
            one.end(stopped, [])
            if stopped is None:
                one.summary({"done": "all", "saved": "https://me:pass@host/x"}, [])
        background.close(trackers)


@pytest.fixture
def followed(tmp_path, monkeypatch) -> Followed:
    """A run folder `run` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Followed(tmp_path / "run")


@pytest.fixture
def services():
    """services(use_tensorboard=True, ...) -> what options of trackers ask for."""
    from treetune.cli import trackers
    from treetune.cli.options.trackers import TrackerOptions

    return lambda **options: trackers.services(TrackerOptions(**options))
