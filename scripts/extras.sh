#!/bin/sh
# Tests that need packages beside the lock, in an environment laid over .venv. PEFT brings accelerate, with which diffusers loads weights
# another way, and no result of the pipeline should hang on a package that only these tests need. torchao is the extra `lowbit`. Triton comes
# with torch's CUDA builds; here its interpreter runs the kernels on the CPU. MegaBlocks without nvcc is its Python alone.
set -eu
.venv/bin/python -m venv .venv-extras
site=$(.venv-extras/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/venv.pth"
.venv-extras/bin/pip install -q --no-deps --disable-pip-version-check peft==0.21.2 accelerate==1.15.0 torchao==0.18.0 triton==3.9.0
# Built with .venv's setuptools: the one that a new environment brings has no wheel.
.venv/bin/python -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check --upgrade --target "$site" megablocks==0.10.0
# CompBench's noun phrases; the lock has it not, as only that scorer asks for it.
.venv-extras/bin/pip install -q --disable-pip-version-check spacy==3.8.18
.venv-extras/bin/python -m pytest -p no:cacheprovider tests/moe_core/test_lora_peft.py tests/moe_core/test_offload.py \
    tests/moe_core/test_compbench_bvqa.py
TRITON_INTERPRET=1 .venv-extras/bin/python -m pytest -p no:cacheprovider tests/moe_core/test_kernels.py
# torchao compiles its step where it can; a compiler for the CPU is not asked for.
TORCHDYNAMO_DISABLE=1 exec .venv-extras/bin/python -m pytest -p no:cacheprovider -m "slow or not slow" -k eight_bit \
    tests/tasks/test_checkpoints.py tests/tasks/test_sharded_training.py tests/tasks/test_plan.py
