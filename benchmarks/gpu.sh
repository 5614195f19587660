#!/usr/bin/env bash
# The run for the day a GPU is at hand: correctness first, then speed; JSON and tables into $OUT (default benchmarks/results/gpu).
#   benchmarks/gpu.sh [--budget SECONDS] [--only PART ...] [--dry]     --dry: tiny shapes on the CPU
# PYTHON: the interpreter, one that has torch; no package of ours needs to be installed.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"
