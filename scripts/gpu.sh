#!/bin/sh
# MegaBlocks' metadata forbids a current torch, so it is installed without dependencies; its kernels are compiled on this machine.
set -eu
fail() { printf 'gpu: %s\n' "$*" >&2; exit 1; }
.venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "torch sees no CUDA device in .venv; megablocks runs on CUDA only"
command -v nvcc >/dev/null 2>&1 || fail "nvcc is not on the PATH; grouped_gemm is compiled, install the CUDA toolkit of torch's version"
.venv/bin/python -m pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk grouped_gemm || fail "the build failed, see above"
.venv/bin/python -c 'import megablocks.ops, grouped_gemm' || fail "megablocks does not import"
