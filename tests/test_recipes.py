"""docs/recipes.md has every example, and figures of runs only."""

import importlib
import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
recipes, recipes_page = map(importlib.import_module, ("recipes", "recipes_page"))

EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.yaml")}


def test_every_example_is_a_recipe_with_a_row():
    assert set(recipes_page.TEXTS) == EXAMPLES == {*recipes.RECIPES, "serve"}
    page = recipes_page.PAGE.read_text()
    assert [name for name in EXAMPLES if f"| `examples/{name}.yaml` |" not in page] == []


def test_the_page_is_made_of_the_files_with_figures():
    assert recipes_page.PAGE.read_text() == recipes_page.page(), "run python benchmarks/recipes_page.py"


def test_figures_are_of_the_files_and_steps_that_they_name():
    for name, one in recipes_page.measured().items():
        assert one["recipe"] == name and f"--config examples/{name}.yaml" in one["command"] and one["steps"] > 0
        limit = one["flags"].partition("--max-steps ")[2]
        assert not limit or one["steps"] == int(limit), name
        assert 0 < one["cpu_s"] <= 1.1 * one["machine"]["threads"] * one["wall_s"], name
        assert json.dumps(one).count("NaN") == 0


def test_commands_of_recipes_are_those_that_the_files_name():
    for name, recipe in recipes.RECIPES.items():
        path = ROOT / "examples" / f"{name}.yaml"
        assert path.read_text().startswith(f"# treetune {recipe.method} --config examples/{name}.yaml\n")
        assert bool(recipe.server) == bool(yaml.safe_load(path.read_text()).get("use_vllm"))
