#!/bin/sh
# Makes .venv with the exact versions of requirements.lock. Every way to fail is one line.
set -eu

say() { printf '%s\n' "$*"; }
fail() { say "setup: $*" >&2; exit 1; }

command -v git >/dev/null 2>&1 || fail "git is not installed; install it (Debian: apt-get install git)"
git rev-parse --git-dir >/dev/null 2>&1 || fail "$(pwd) is not a git checkout; DVC and the worktree of a run need one: git clone the repository"

works() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }
python=""
for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if command -v "$candidate" >/dev/null 2>&1 && works "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    found=$(${PYTHON:-python3} --version 2>&1 || true)
    fail "needs Python 3.11 or 3.12 with venv, found: ${found:-none}; install one, or name it: make PYTHON=/path/to/python3.11 ${1:-setup}"
fi

need_mb=${DENSE2MOE_NEED_MB:-9000}
free_mb=$(df -Pm . | awk 'NR == 2 {print $4}')
if [ "$free_mb" -lt "$need_mb" ]; then
    fail "$free_mb MB free on $(pwd), but the environment and a demo run need $need_mb MB; free some, or set DENSE2MOE_NEED_MB"
fi

say "setup: $($python --version) -> .venv, exact versions of requirements.lock (about two minutes)"
rm -rf .venv
"$python" -m venv .venv || fail "$python cannot make a virtual environment at $(pwd)/.venv"
log=.venv/install.log
if ! .venv/bin/python -m pip install --disable-pip-version-check -q --no-deps -r requirements.lock >"$log" 2>&1; then
    grep -i error "$log" | head -n 3 >&2
    fail "pip could not install requirements.lock; the whole output is in $log"
fi
# A torch with CUDA needs libraries that the lock, the same for every build of torch, cannot name; torch names their exact versions.
if ! .venv/bin/python -m pip install --disable-pip-version-check -q -c requirements.lock "$(grep '^torch==' requirements.lock)" >"$log" 2>&1; then
    grep -i error "$log" | head -n 3 >&2
    fail "pip could not install what this build of torch needs; the whole output is in $log"
fi
# The command `dense2moe`; modules are taken from the folder one stands in, as ever, and otherwise from here.
if ! .venv/bin/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e . >"$log" 2>&1; then
    grep -i error "$log" | head -n 3 >&2
    fail "pip could not install this project; the whole output is in $log"
fi
.venv/bin/python -m pip check >"$log" 2>&1 || fail "installed versions do not fit together: $(head -n 1 "$log")"
touch .venv/.locked
say "setup: done"
