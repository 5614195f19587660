"""Every Triton kernel compiles for a real GPU: the interpreter accepts programs that the compiler refuses. Needs no GPU."""

import os

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from treetune.ops import backend, clamped_swiglu, dequantise, geglu, grouped_kernels, logprob_kernels, noise, rms_norm, rope, swiglu  # noqa: E402

CASES = {
    "rms_norm": (rms_norm._forward_kernel, "*bf16 *bf16 *bf16 *fp32 i32 fp32", {"ONCE": False, "BLOCK": 4096}),
    "rms_norm_once": (rms_norm._forward_kernel, "*bf16 *fp32 *bf16 *fp32 i32 fp32", {"ONCE": True, "BLOCK": 4096}),
    "rms_norm_backward": (
        rms_norm._backward_kernel,
        "*bf16 *bf16 *bf16 *fp32 *bf16 *fp32 i32 i32 i32",
        {"WITH_DSCALE": True, "BLOCK": 4096},
    ),
    "rope": (rope._kernel, "*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 i32 i32 i32", {"Q_HEADS": 32, "K_HEADS": 8, "HALF": 64}),
    "swiglu": (swiglu._forward_kernel, "*bf16 *bf16 *bf16 i32", {"BLOCK": 1024}),
    "clamped_swiglu": (clamped_swiglu._forward_kernel, "*bf16 *bf16 i32 fp32 fp32", {"BLOCK": 1024}),
    "clamped_swiglu_backward": (clamped_swiglu._backward_kernel, "*bf16 *bf16 *bf16 i32 fp32 fp32", {"BLOCK": 1024}),
    "four_bits": (dequantise._four_bits_kernel, "*u8 *fp32 *fp32 *bf16 i32", {"BLOCK": 64, "BYTES": 1024}),
    "dropout": (noise._dropout_kernel, "*bf16 *i64 *i64 *bf16 i32 fp32 fp32", {"BLOCK": noise.BLOCK}),
    "geglu": (geglu._forward_kernel, "*bf16 *bf16 *bf16 i32", {"BLOCK": 1024}),
    "geglu_backward": (geglu._backward_kernel, "*bf16 *bf16 *bf16 *bf16 *bf16 i32", {"BLOCK": 1024}),
    "swiglu_backward": (swiglu._backward_kernel, "*bf16 *bf16 *bf16 *bf16 *bf16 i32", {"BLOCK": 1024}),
}
TILE = {"ROWS": grouped_kernels.ROWS, "COLS": grouped_kernels.COLS, "STEP": grouped_kernels.STEP}
for dtype in ("fp32", "bf16"):
    CASES[f"grouped_rows_{dtype}"] = (
        grouped_kernels._rows_kernel,
        f"*{dtype} *{dtype} *{dtype} *i32 *i32 *i32 i32 i32 i32 i32 i32 i32",
        TILE,
    )
    CASES[f"grouped_outer_{dtype}"] = (grouped_kernels._outer_kernel, f"*{dtype} *{dtype} *{dtype} *i32 i32 i32", TILE)
for flag in (False, True):
    CASES[f"stats_{flag}"] = (
        logprob_kernels._stats_kernel,
        "*fp32 *i64 *fp32 fp32 i32 i32 *fp32 *bf16",
        {"HAS_Y": True, "HAS_CAP": flag, "EXTRAS": flag, "AHEAD": True, "BLOCK": 4096},
    )
    CASES[f"grad_{flag}"] = (
        logprob_kernels._grad_kernel,
        "*fp32 *i64 *fp32 fp32 i32 i32 *fp32 *fp32 *bf16",
        {"HAS_CAP": flag, "HAS_MEAN": flag, "BLOCK": 4096},
    )
LATER = ("stats_False", "grad_False", "grouped_outer_fp32")  # less of the same code, or the tiles of grouped_rows_fp32

# As they are launched; all others with Triton's 4.
ROWS = (rms_norm._forward_kernel, rms_norm._backward_kernel, logprob_kernels._stats_kernel, logprob_kernels._grad_kernel)
WARPS = dict.fromkeys(ROWS, backend.warps_of(4096)) | {rope._kernel: rope.warps_of(32, 64)}


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name for name in CASES])
def test_compiles(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants = CASES[name]
    signature = dict(zip(kernel.arg_names, types.split() + ["constexpr"] * len(constants), strict=True))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS.get(kernel, 4)})
    assert compiled.asm["cubin"]
