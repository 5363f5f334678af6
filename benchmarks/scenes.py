"""The experiment `scenes` in numbers: is the teacher's capacity used, and what do the levels keep of it?

    dvc exp run -S experiment=scenes -S moe=1s12e2a -S mob=small
    python -m benchmarks.scenes                      gathers this checkout's evaluations into benchmarks/results/scenes.json

What the FFNs cut to r = 1.5 lose (shared experts alone, conditioning whole, the steps of shared-expert KD and MoE KD together), in a second
checkout that begins with the same teacher (`dvc exp run` finds it in DVC's run cache):

    dvc exp run -S experiment=scenes -S moe=1s12e2a -S mob=small -S moe.shared_ratio=1.5 -S moe.num_experts=10 \\
        -S moe.conditioning_dim=null \\
        -S kd.shared_expert.optimizer.steps=600 evaluate@shared
    python -m benchmarks.scenes --cut FOLDER         adds what the checkout FOLDER found
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flows import results

RESULTS = Path("benchmarks/results/scenes.json")


def evaluations(checkout: Path) -> dict[str, dict[str, Any]]:
    """Model -> its metrics, as the evaluations of a checkout left them."""
    found = {str(row.pop("model")): row for row in results.models(checkout / "reports")}
    if "teacher" not in found:
        raise SystemExit(f"{checkout}/reports/stages has no evaluation of the teacher; run the experiment there first")
    return found


def main() -> None:
    """Writes the results and prints accuracy by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", type=Path, metavar="FOLDER", help="checkout of the run with r_s = 1.5")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.cut:
        cut = evaluations(given.cut)
        loss = cut["teacher"]["accuracy"] - cut["shared"]["accuracy"]
        found["cut_to_r_1.5"] = {"teacher": cut["teacher"], "cut": cut["shared"], "points_lost": round(100 * loss, 2)}
    else:
        found["models"] = evaluations(Path.cwd())
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    for name, metrics in found.get("models", {}).items():
        print(f"{name:8} {metrics['accuracy']:.3f}")
    if "cut_to_r_1.5" in found:
        print(f"cut to r = 1.5: {found['cut_to_r_1.5']['points_lost']} points lost")


if __name__ == "__main__":
    main()
