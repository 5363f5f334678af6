"""Where the stages' outs lie, relative to the checkout; dvc.yaml says the same."""

from pathlib import Path

SOURCE = Path("data/source")
PROMPTS = Path("data/prompts.jsonl")
SUITES = Path("data/suites")
TEACHER = Path("data/teacher")
SHARDS = Path("data/shards")
EVALUATOR = Path("data/evaluator")
CLIP = "clip"
"""The evaluator's small CLIP, in its folder."""
IMPORTANCE = Path("data/importance")
SHARED_EXPERT = Path("data/checkpoints/shared_expert")
MOE = Path("data/checkpoints/moe")
MOB = Path("data/checkpoints/mob")
BASELINES = Path("data/checkpoints/baselines")
"""Those that stages make; `data/baselines` has the ones that were given."""
IMAGES = Path("data/images")
STAGE_REPORTS = Path("reports/stages")
CURVES = Path("reports/curves")
INSPECTIONS = Path("data/inspections")
EVALUATIONS = Path("data/evaluations")
SANITY = Path("reports/sanity.json")
LATENCY = Path("reports/latency.json")
STUDIES = Path("data/studies")
STUDY_REPORTS = Path("reports/studies")

DENSE = "teacher"
"""Name of the dense model among those that are evaluated."""
