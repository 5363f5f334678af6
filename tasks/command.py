"""`dense2moe`: what one asks without running a stage."""

from __future__ import annotations

import sys

USAGE = """usage: dense2moe plan [KEY=VALUE ...]

plan   what a run will build and take, before it starts: dense2moe plan experiment=flux1-moe-l compute=h100x8 data.path=/tars"""


def main() -> int:
    """Entry point of the console script."""
    match sys.argv[1:]:
        case ["plan", *rest]:
            # Brings torch.
            from tasks import plan

            return plan.main(rest)
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2
