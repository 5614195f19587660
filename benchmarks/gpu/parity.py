"""Every op with the launch parameters it runs with against its reference, forward and backward, and against itself: python parity.py TABLE.

TABLE: CASES, LOGPROB or ATTENTION of tests/ops/gpu_cases.py.
"""

import importlib.util
import sys
import traceback
from pathlib import Path

import device
import torch

spec = importlib.util.spec_from_file_location("gpu_cases", Path(__file__).resolve().parents[2] / "tests" / "ops" / "gpu_cases.py")
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def check(name: str, case, dtype: torch.dtype) -> None:
    """Report one case in a dtype; one that raises is wrong, and the next goes on."""
    label = f"{name} {str(dtype)[6:]}"
    try:
        measured = cases.measure(case, cases.Draw(device.DEVICE, dtype, small=device.DRY))
    except Exception:
        device.report(label, ok=False, error=traceback.format_exc().strip().splitlines()[-8:])
        return
    rounded = {"errors": measured.errors, "plain": measured.plain}
    rounded = {key: [float(f"{value:.2e}") for value in values] for key, values in rounded.items()}
    device.report(label, ok=measured.fits(case, dtype), repeated=measured.repeated, **rounded)


def main(table: str) -> None:
    device.interpreted()
    chosen = getattr(cases, table)
    chosen = dict(list(chosen.items())[:: 7 if table == "ATTENTION" else 1]) if device.DRY else chosen
    for dtype in (torch.float32,) if device.DRY else (torch.bfloat16, torch.float32):
        for name, case in chosen.items():
            if dtype in case.dtypes:
                check(name, case, dtype)


if __name__ == "__main__":
    main(sys.argv[1])
