#!/bin/sh
# The tests of LoRAs that need PEFT, in an environment laid over .venv: PEFT brings accelerate, with which diffusers loads weights another
# way, and no result of the pipeline should hang on a package that only these tests need.
set -eu
.venv/bin/python -m venv .venv-peft
site=$(.venv-peft/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/venv.pth"
.venv-peft/bin/pip install -q --no-deps --disable-pip-version-check peft==0.21.2 accelerate==1.15.0
exec .venv-peft/bin/python -m pytest -p no:cacheprovider tests/moe_core/test_lora_peft.py
