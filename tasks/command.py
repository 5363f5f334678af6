"""`dense2moe`: what one asks without running a stage."""

from __future__ import annotations

import sys

USAGE = """usage: dense2moe plan [KEY=VALUE ...]
       dense2moe evaluate PIPELINE [--out FOLDER] [--against MODEL] [KEY=VALUE ...]
       dense2moe scorers
       dense2moe backends

plan       what a run will build and take, before it starts: dense2moe plan experiment=flux1-moe-l compute=h100x8 data.path=/tars
evaluate   the suites of `eval` on any diffusers text-to-image pipeline, a folder or a hub id
scorers    which scorers there are, what they measure, and what each needs
backends   which backend computes the experts on this machine, by size: what `compute.expert_backend=auto` has measured"""


def main() -> int:
    """Entry point of the console script."""
    match sys.argv[1:]:
        case ["plan", *rest]:
            # Brings torch.
            from tasks import plan

            return plan.main(rest)
        case ["evaluate", *rest]:
            from tasks import foreign

            return foreign.main(rest)
        case ["scorers"]:
            print(scorers())
            return 0
        case ["backends"]:
            print(backends())
            return 0
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2


def scorers() -> str:
    """A paragraph a scorer."""
    from moe_core.metrics import registry

    lines = []
    for name, spec in registry.SPECS.items():
        lines += [
            name,
            "  measures: " + ", ".join([m.name for m in spec.measures] + [m.name for m in spec.set_measures]),
        ]
        lines += [f"  eval.models.{asset.key}: {asset.what}" for asset in spec.assets]
        lines += [f"  package: {package}" for package in spec.packages]
        lines += ["  compares with the reference model's pictures"] if spec.needs_reference else []
    return "\n".join(lines)


def backends() -> str:
    """The table of measured choices, in Markdown."""
    from moe_core import backend_choice

    rows = backend_choice.table()
    if not rows:
        return f"no choice has been measured yet ({backend_choice.path()})"
    lines = ["| " + " | ".join(row.values()) + " |" for row in rows]
    head = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    return "\n".join([str(backend_choice.path()), "", head, *lines])
