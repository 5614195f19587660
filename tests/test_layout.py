"""The rules of the tree itself: who may import whom, which packages ship, how large things may be, what names are taken."""

import ast
import functools
import re
import statistics
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "ops", "models", "losses", "cli")
CODE = (*PACKAGES, "tests", "benchmarks", "examples")

# What the files of a folder may import at all: packages, and modules of treetune by prefix.
ALLOWED = {
    "ops": {"torch", "triton", "treetune.ops"},
    "core": {"torch", "treetune.core"},
    "core/config": {"treetune.core"},
    "core/data": {"treetune.core", "transformers", "tokenizers", "datasets", "numpy", "torch"},
    "core/rollout": {"treetune.core", "httpx", "numpy", "tenacity", "torch"},
    # What a tracker imports of its own package, it imports by name in a process of its own.
    "core/trackers": {"treetune.core"},
    # One run, whatever the method: it is given callables, and knows no model and no terminal.
    "core/run": {"treetune.core", "jinja2", "numpy", "torch"},
    "models": {
        "torch", "treetune.models", "treetune.ops",
        *(
            f"treetune.core.{name}"
            for name in (
                "tree", "param", "grad", "gathers", "shard", "lora", "lora_use", "quant", "quant_parts", "quant_tables", "strided",
                "fields", "layer_offload", "machine", "partition", "tensor_file", "manifest", "drafts", "durable", "check", "state",
                "module_names", "optim", "owned", "protocols", "heartbeat", "run.errors",
            )
        ),
    },
    "losses": {
        "torch", "treetune.core.state", "treetune.core.check", "treetune.core.registry",
        *(
            f"treetune.losses.{name}"
            for name in (
                "reduce", "limits", "ratio", "advantage", "sft", "preference", "reward", "policy", "divergence", "correction", "ebft",
                "kto", "presets", "routing",
            )
        ),
    },
}  # fmt: skip
# What single files may import besides, inside the function that needs it only.
LAZY = {
    "core/ckpt_parts.py": {"safetensors"},
    "core/tensor_file.py": {"safetensors"},
    "core/lora.py": {"safetensors"},
    "core/quant.py": {"treetune.ops.dequantise"},
    "core/grad.py": {"treetune.ops.kept"},
    "core/rounding.py": {"treetune.ops.noise"},
    "core/optim_projections.py": {"treetune.ops.noise"},
    "core/optim.py": {"bitsandbytes"},
    "core/data/bounded_jinja.py": {"jinja2"},
    "core/data/files.py": {"fsspec", "zstandard"},
    "core/data/hub.py": {"pyarrow"},
    "core/data/arrow.py": {"pyarrow"},
    "core/config/reading.py": {"yaml"},
    "core/run/provenance.py": {"yaml"},
    "core/rollout/judge.py": {"httpx", "tenacity"},
    "core/hub_repos.py": {"huggingface_hub", "tenacity"},
    "core/data/yamltext.py": {"yaml"},
    "models/adapter.py": {"safetensors"},
    "models/adapter_parameters.py": {"transformers"},
    "models/bridge_attention.py": {"transformers"},
    "models/bridge_experts.py": {"transformers"},
    "models/bridge_files.py": {"transformers"},
    "models/bridge_skeleton.py": {"transformers"},
    "models/fetch.py": {"huggingface_hub", "safetensors"},
    "models/gguf.py": {"gguf", "numpy", "tokenizers", "transformers"},
    "models/gguf_writer.py": {"gguf", "numpy"},
    "models/vocabulary.py": {"tokenizers"},
    "models/plain_model.py": {"transformers"},
    "models/hf_weights.py": {"safetensors"},
    "models/hf.py": {"huggingface_hub", "safetensors", "transformers"},
}
# Parts of a folder that its other files must not reach.
INNER = {"core": ("treetune.core.config", "treetune.core.data", "treetune.core.rollout", "treetune.core.run", "treetune.core.trackers")}
LAZY_IN_CORE_DATA = {"transformers", "tokenizers", "datasets"}  # slow to import: never at the top of a file


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def _imports(path: Path) -> list[tuple[str, bool]]:
    """(module or module.name, whether at the top level) of each import of a file; `from a import b` gives a.b."""
    found, parsed = [], ast.parse(path.read_text())
    top = {id(node) for node in ast.walk(ast.Module(_eager(parsed), []))}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno} is a relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def _eager(parsed: ast.Module) -> list[ast.stmt]:
    """The statements that run when the file is imported, functions left out."""
    return [node for node in parsed.body if not isinstance(node, ast.FunctionDef | ast.ClassDef) and not _for_types_only(node)]


def _for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def _folder(path: Path) -> str:
    name = path.parent.relative_to(ROOT).as_posix()
    return name if name in ALLOWED else name.split("/")[0]


def _offences(path: Path) -> list[str]:
    folder, out = _folder(path), []
    allowed, lazy = ALLOWED[folder], LAZY.get(_name(path), set())
    for module, top in _imports(path):
        if module.split(".")[0] in sys.stdlib_module_names or module.startswith("__future__"):
            continue
        inner = folder in INNER and _within(module, set(INNER[folder]))
        if inner or not (_within(module, allowed) or (_within(module, lazy) and not top)):
            out.append(f"{_name(path)} imports {module}" + (" at its top" if _within(module, lazy) else ""))
        elif folder == "core/data" and top and _within(module, LAZY_IN_CORE_DATA):
            out.append(f"{_name(path)} imports {module} at its top")
    return out


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    paths = [path for path in _files(folder.split("/")[0]) if _folder(path) == folder] if (ROOT / folder).is_dir() else []
    assert [text for path in paths for text in _offences(path)] == []


def test_every_package_folder_is_covered():
    assert {_folder(path) for path in _files(*PACKAGES)} - {"cli"} <= set(ALLOWED)
    assert [name for name in LAZY if (ROOT / name).exists()], "the exceptions name no file that exists"


def test_nobody_imports_cli_and_only_cli_talks_to_people():
    for path in _files("core", "ops", "models", "losses"):
        for module, _ in _imports(path):
            assert not _within(module, {"treetune.cli", "tyro", "rich"}), f"{_name(path)} imports {module}"


def test_the_package_is_never_imported_by_its_bare_folders():
    for path in _files(*(folder for folder in CODE if (ROOT / folder).is_dir())):
        for module, _ in _imports(path):
            assert module.split(".")[0] not in PACKAGES, f"{_name(path)} imports {module}: write treetune.{module}"


@pytest.mark.parametrize("name", ["core/tree.py", "models/hf.py"])
def test_an_offence_is_seen(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("import rich\nfrom treetune.cli import main\nfrom treetune.core.data import pack\nimport safetensors\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(_offences(path)) == 4


def test_packages_of_pyproject_are_the_folders_with_init():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")}
    names = {f"treetune.{folder.replace('/', '.')}": folder for folder in folders}
    names |= {"treetune.samples": "examples/data"}  # rows alone, which commands read where no data is named
    names |= {"treetune.examples": "examples", "treetune.docs": "docs"}  # which treetune fetch and agent-docs give
    assert set(config["packages"]) == set(names) and config["package-dir"] == names
    with_code = {path.parent.relative_to(ROOT).as_posix() for path in _files(*PACKAGES)}
    assert with_code == folders, "a folder with Python files has no __init__.py"
    assert not (ROOT / "__init__.py").exists()


def test_types_resolve_on_a_checkout_and_after_an_install():
    links = {path.name: path.resolve() for path in (ROOT / ".typing" / "treetune").iterdir()}
    assert links == {name: ROOT / name for name in PACKAGES}
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").exists()] == []


def test_no_file_is_longer_than_400_lines():
    long = {_name(path): n for path in _files(*CODE) if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


@pytest.mark.parametrize("folder", PACKAGES)
def test_functions_are_short(folder):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for path in _files(folder) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    assert statistics.median(node.end_lineno - node.lineno + 1 for node in nodes) <= 15


def test_no_file_is_named_like_a_stdlib_module():
    taken = sys.stdlib_module_names - {"__main__"}
    assert [_name(path) for path in _files(*PACKAGES) if path.stem in taken] == []
    assert [name for name in PACKAGES if name in taken] == []


def _texts() -> list[Path]:
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".jinja"}
    found = [path for folder in (*CODE, "docs") if (ROOT / folder).is_dir() for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    top = [path for path in ROOT.iterdir() if path.suffix in kinds or path.name in ("Makefile", "LICENSE")]
    return [path for path in found + top if path != Path(__file__)]


def test_no_text_names_a_machine():
    paths = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt)/\w")
    hits = [f"{_name(path)}: {match[0]}" for path in _texts() if (match := paths.search(path.read_text()))]
    assert hits == []
    docs = [path for path in _texts() if path.suffix == ".md"]
    assert [_name(path) for path in docs if "/tmp/" in path.read_text()] == []


def test_every_failure_in_the_docs_names_a_test_that_exists():
    named = re.findall(r"`(tests/\S+?)::(\w+)`", (ROOT / "docs" / "failures.md").read_text())
    assert len(named) >= 25
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"
