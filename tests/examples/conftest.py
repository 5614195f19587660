"""The fixtures of tests/cli: the tiny model and a way to run commands."""

import importlib.util
import sys
from pathlib import Path

PATH = Path(__file__).parents[1] / "cli" / "conftest.py"
spec = importlib.util.spec_from_file_location("command_line_fixtures", PATH)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
tiny, kit, here, tune = module.tiny, module.kit, module.here, module.tune
