"""T2I-CompBench++ (Huang et al. 2023, 2025): its prompts, and which scorer scores which category.

- Eight categories of 300 prompts, ten pictures a prompt. Their kinds are the names of the official files.
- Colour, shape and texture by B-VQA; 2D spatial, 3D spatial and numeracy by boxes ("UniDet"); non-spatial and complex by S-CoT. So Table 1
  of Dense2MoE has it: the paper's own table for complex is another measure ("3-in-1"), which is not here.
- Each scorer's number is the mean of its three (two) categories' means.

Source: Karine-Huang/T2I-CompBench, examples/dataset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_core.errors import DataError
from moe_core.metrics.compbench_bvqa import KINDS as B_VQA
from moe_core.metrics.compbench_numeracy import parse_counts, parse_plurals
from moe_core.metrics.compbench_scot import OFFICIAL_NAMES
from moe_core.metrics.compbench_spatial import RELATIONS_2D, RELATIONS_3D, parse_relation
from moe_core.metrics.scorer import Asset, Measure, MissingAsset, Prompt, ScorerSpec

UNIDET = ("spatial", "3d_spatial", "numeracy")
S_COT = tuple(OFFICIAL_NAMES)
KINDS = (*B_VQA, *UNIDET, *S_COT)
SCORER_OF = {
    **dict.fromkeys(B_VQA, "compbench_bvqa"),
    **dict.fromkeys(UNIDET, "compbench_unidet"),
    **dict.fromkeys(S_COT, "compbench_scot"),
}
"""category -> the scorer whose measures count it"""
PICTURES = 10
"""a prompt"""
_PLURALS = "new_objects.txt"

SPECS = (
    ScorerSpec(
        name="compbench_bvqa",
        load_from="moe_core.metrics.compbench_bvqa:load",
        measures=(Measure("compbench_bvqa", "bvqa", over_kinds=True, by_kind=True, kinds=B_VQA),),
        assets=(
            Asset("blip_vqa", "BLIP-VQA, Salesforce/blip-vqa-capfilt-large"),
            Asset("spacy_english", "spaCy's small English pipeline, the package en_core_web_sm"),
        ),
        packages=("spacy",),
    ),
    ScorerSpec(
        name="compbench_unidet",
        load_from="moe_core.metrics.compbench_unidet:load",
        measures=(
            Measure("compbench_unidet", "unidet", over_kinds=True, by_kind=True, kinds=UNIDET),
            Measure("compbench_unidet_swapped", "unidet_swapped", over_kinds=True, by_kind=True, kinds=UNIDET),
        ),
        assets=(
            Asset("open_detector", "OWLv2, google/owlv2-base-patch16-ensemble"),
            Asset("depth", "MiDaS' DPT, Intel/dpt-hybrid-midas (the official weights) or Intel/dpt-large"),
        ),
    ),
    ScorerSpec(
        name="compbench_scot",
        load_from="moe_core.metrics.compbench_scot:load",
        measures=(
            # The official script says 0 to 100, and so does Dense2MoE; T2I-CompBench++'s tables say 0 to 1.
            Measure("compbench_scot", "scot", scale=100.0, over_kinds=True, by_kind=True, kinds=S_COT),
            Measure("compbench_scot_unparsed", "scot_unparsed", rising=False, by_kind=True, kinds=S_COT, binary=True),
        ),
        assets=(
            Asset("sharegpt4v", "ShareGPT4V-7B in transformers' LLaVA format, converted from Lin-Chen/ShareGPT4V-7B"),
            Asset(
                "compbench_share_eval",
                "the file MLLM_eval/ShareGPT4V-CoT_eval/Share_eval.py of github.com/Karine-Huang/T2I-CompBench, for its questions",
            ),
        ),
    ),
)


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts of `<kind>_val.txt` in the official folder examples/dataset, kind by kind, in the files' order.

    A prompt is a line up to its first tab; its id is `<kind>/<line>`, lines from 1. A line may come twice, as some do in the first release
    of color_val.txt. Prompts of the box categories have in `record` what they ask for: `relation` (first thing, relation, second
    thing), or `counts` ((thing, how many), ...), for which new_objects.txt must be there.

    Raises MissingAsset naming the files that are not there, DataError for an empty file or line, or a prompt that asks for nothing.
    """
    missing = [name for name in (*map(_file, KINDS), _PLURALS) if not (folder / name).is_file()]
    if missing:
        raise MissingAsset(
            f"{folder} has no {', '.join(missing)}; fetch examples/dataset of github.com/Karine-Huang/T2I-CompBench"
        )
    plurals = parse_plurals((folder / _PLURALS).read_text(encoding="utf-8"))
    prompts = []
    for kind in KINDS:
        path = folder / _file(kind)
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines:
            raise DataError(f"{path} is empty; it must have a prompt a line")
        for number, line in enumerate(lines, start=1):
            text = line.split("\t")[0].strip()
            if not text:
                raise DataError(f"{path}, line {number} has no prompt; each line must have one")
            try:
                record = _record(kind, text, plurals)
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            prompts.append(Prompt(f"{kind}/{number}", text, kind, record))
    return prompts


def _file(kind: str) -> str:
    return f"{kind}_val.txt"


def _record(kind: str, text: str, plurals: dict[str, str]) -> dict[str, Any]:
    if kind == "spatial":
        return {"relation": parse_relation(text, RELATIONS_2D)}
    if kind == "3d_spatial":
        return {"relation": parse_relation(text, RELATIONS_3D)}
    if kind == "numeracy":
        return {"counts": parse_counts(text, plurals)}
    return {}
