"""The report: what it shows is what it was given, the same bytes each time, and nothing missing in silence."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from matplotlib import font_manager

from moe_core.config import BaselineConfig
from moe_core.errors import DataError
from tasks import plot_style, report, report_findings, report_table
from tasks.report_gallery import chosen
from tasks.report_inputs import load
from tests.tasks import report_inputs_made as made

EMPTY = pd.DataFrame()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made.write_inputs(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose report was made from the CSV curves; tests only read it."""
    root = tmp_path_factory.mktemp("built")
    made.write_inputs(root)
    report.build(root, made.params(), EMPTY)
    return root


def outputs(root: Path) -> dict[str, bytes]:
    reports = root / "reports"
    files = [reports / "index.html", reports / "report.md", *sorted((reports / "figures").iterdir())]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def judge(root: Path, model: str, **values: object) -> None:
    path = root / "data" / "evaluations" / f"{model}.json"
    change(path, judged=json.loads(path.read_text())["judged"] | values)


def markdown_rows(root: Path) -> dict[str, list[str]]:
    """The results table of report.md: model title -> cells."""
    text = (root / "reports" / "report.md").read_text().partition("## Results")[2].partition("##")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells[2:]}


def tracked(root: Path, stage: str, **labels: object) -> pd.DataFrame:
    """The rows that the tracking database's frame would have for a stage's curve."""
    long = (
        pd.read_csv(root / "reports" / "curves" / f"{stage}.csv")
        .melt(id_vars=["step", "split"], var_name="name")
        .dropna()
    )
    frame = pd.DataFrame({"metric": long["split"] + "/" + long["name"], "step": long["step"], "value": long["value"]})
    given = {
        "run_id": "a",
        "stage": stage,
        "fingerprint": "0123456789ab",
        "status": "FINISHED",
        "cached_from": None,
        "start_time": 1,
    } | labels
    return frame.assign(**given)


def test_same_inputs_give_the_same_bytes_also_from_the_tracking_frame(built: Path, root: Path) -> None:
    stages = [path.stem for path in sorted((root / "reports" / "curves").iterdir())]
    frame = pd.concat([tracked(root, stage) for stage in stages]).sample(frac=1, random_state=0)
    report.build(root, made.params(), frame)
    assert outputs(root) == outputs(built)


def test_the_page_needs_no_other_file(built: Path) -> None:
    html = (built / "reports" / "index.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert "<script" not in html
    assert "url(" not in html


def test_markdown_refers_to_files_that_exist(built: Path) -> None:
    reports = built / "reports"
    links = re.findall(r"\]\((figures/[^)]+|index\.html)\)", (reports / "report.md").read_text())
    assert len(links) == 8
    assert all((reports / link).is_file() for link in links)


def test_table_has_the_numbers_of_the_inputs(built: Path) -> None:
    rows = markdown_rows(built)
    assert list(rows) == [report_table.title(model) for model in made.MODELS]
    for model in made.MODELS:
        given = json.loads((built / "data" / "evaluations" / f"{model}.json").read_text())
        latency = json.loads((built / "reports" / "latency.json").read_text())["models"][model]["1"]["ratio"]
        nfe, flops, activated, _, total, slower, accuracy, _, ratio, fid, distance, kd = rows[report_table.title(model)]
        scale = {"k": 1e3, "M": 1e6}
        assert int(nfe) == given["nfe"]
        for cell, value in (
            (flops, given["flops"]),
            (activated, given["params"]["activated"]),
            (total, given["params"]["total"]),
        ):
            number, unit = cell.split()[:2]
            assert float(number) * scale[unit] == pytest.approx(value, rel=5e-3)
        assert float(slower) == pytest.approx(latency, abs=5e-3)
        assert float(accuracy.removesuffix(" %")) == pytest.approx(100 * given["judged"]["accuracy"], abs=0.05)
        assert float(ratio) == pytest.approx(given["judged"]["accuracy"] / made.ACCURACY["teacher"], abs=5e-4)
        for cell, value in (
            (fid, given["judged"]["fid"]),
            (distance, given["teacher_distance"]),
            (kd, given["kd_loss"]),
        ):
            assert float(cell) == pytest.approx(value, rel=5e-3, abs=1e-9)


def test_page_and_markdown_show_the_same_table(built: Path) -> None:
    html = (built / "reports" / "index.html").read_text()
    for model, cells in markdown_rows(built).items():
        row = html.partition(f'<th scope="row">{model}</th>')[2].partition("</tr>")[0]
        for cell in cells:
            shown = cell.partition(" (")[0]
            assert f">{shown}<" in row, f"{model}: {shown}"


def test_kinds_have_their_intervals_below_their_measure(built: Path) -> None:
    lines = (built / "reports" / "report.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| Exactly as asked"))
    assert lines[first + 1].startswith("| · single object ↑ |")
    assert lines[first + 2].startswith("| · colors ↑ |")
    assert "(0.125 to 1)" in lines[first + 1]


def test_a_metric_that_was_not_tried_is_named(built: Path) -> None:
    html, markdown = ((built / "reports" / name).read_text() for name in ("index.html", "report.md"))
    assert "<strong>mps: not measured.</strong> mps needs a folder" in html
    assert "**mps: not measured.** mps needs a folder" in markdown


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("data/evaluations/M.json", "evaluate@M"),
        ("reports/latency.json", "latency"),
        ("reports/stages/evaluator.json", "evaluator"),
        ("reports/stages/mob_kd-XS.json", "mob_kd@XS"),
        ("reports/curves/moe_kd.csv", "moe_kd"),
        ("data/evaluations/shared/pictures.jsonl", "evaluate@shared"),
        ("reports/sanity.json", "sanity"),
        ("data/images/L/own/00003-00.png", "evaluate@L"),
        ("data/importance/block_change.json", "importance"),
        ("data/shards/manifest.json", "shard"),
    ],
)
def test_a_missing_input_is_named_with_its_stage(root: Path, path: str, stage: str) -> None:
    (root / path).unlink()
    with pytest.raises(
        DataError, match=rf"{re.escape(path)} is missing.*; stage {re.escape(stage)} makes it: dvc repro"
    ):
        report.build(root, made.params(), EMPTY)
    assert not (root / "reports" / "index.html").exists()


def test_a_malformed_input_is_named_with_its_key(root: Path) -> None:
    judge(root, "S", accuracy="good")
    with pytest.raises(DataError, match=r"evaluations/S\.json: judged\.accuracy: .*number.*stage evaluate@S"):
        load(root, made.params(), EMPTY)


def test_models_with_other_prompts_are_refused(root: Path) -> None:
    path = root / "data" / "evaluations" / "M" / "pictures.jsonl"
    path.write_text(path.read_text().replace("a red digit 0", "a red digit 9"))
    with pytest.raises(DataError, match=r"data/evaluations/M/pictures\.jsonl has other prompts"):
        load(root, made.params(), EMPTY)


def test_latency_must_cover_every_model(root: Path) -> None:
    path = root / "reports" / "latency.json"
    models = json.loads(path.read_text())["models"]
    change(path, models={name: times for name, times in models.items() if name != "S"})
    with pytest.raises(DataError, match="no model S at batch size 1"):
        load(root, made.params(), EMPTY)


def test_prompts_cannot_break_out_of_the_page(root: Path) -> None:
    for model in made.MODELS:
        path = root / "data" / "evaluations" / model / "pictures.jsonl"
        path.write_text(path.read_text().replace("a red digit 0", '<script>alert(1)</script>\\" | x'))
    report.build(root, made.params(), EMPTY)
    html, markdown = ((root / "reports" / name).read_text() for name in ("index.html", "report.md"))
    assert "<script" not in html
    assert "<script" not in markdown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34; | x" in html
    assert "&lt;script>" in markdown
    assert "\\| x" in markdown


def test_findings_follow_the_targets(root: Path) -> None:
    def marks() -> dict[str, str]:
        found = report_findings.findings(load(root, made.params(), EMPTY))
        return {name: f.mark for f in found for name in ("MoE-L", "MoE-XS") if f.text.startswith(f"{name} keeps")}

    assert marks() == {"MoE-L": "holds", "MoE-XS": "short"}
    judge(root, "XS", accuracy=0.85 * made.ACCURACY["teacher"] + 1e-9)
    judge(root, "L", accuracy=0.97 * made.ACCURACY["teacher"] - 1e-3)
    assert marks() == {"MoE-L": "short", "MoE-XS": "holds"}


def test_findings_name_idle_experts_and_one_sided_routers(root: Path) -> None:
    own = json.loads((root / "data" / "evaluations" / "L.json").read_text())
    use = own["expert_use"] | {"transformer_blocks.1.ff": [0.5, 0.5] + [0.0] * 10}
    change(root / "data" / "evaluations" / "L.json", expert_use=use)
    change(root / "data" / "evaluations" / "M.json", block_use={"transformer_blocks.1-3": [0.99, 0.01, 0.0]})
    short = [f.text for f in report_findings.findings(load(root, made.params(), EMPTY)) if f.mark == "short"]
    assert any("10 get less than" in text and "(transformer_blocks.1.ff) gets 6.0 times" in text for text in short)
    assert any("one block: MoE-M transformer_blocks.1-3" in text for text in short)


def test_curves_come_from_the_last_finished_run_of_the_same_fingerprint(root: Path) -> None:
    frame = pd.concat(
        [
            tracked(root, "moe_kd", run_id="old", start_time=1).assign(value=1.0),
            tracked(root, "moe_kd", run_id="right", start_time=2).assign(value=2.0),
            tracked(root, "moe_kd", run_id="other", start_time=3, fingerprint="ffffffffffff").assign(value=3.0),
            tracked(root, "moe_kd", run_id="killed", start_time=4, status="FAILED").assign(value=4.0),
            tracked(root, "moe_kd", run_id="cached", start_time=5, cached_from="right").assign(value=5.0),
        ]
    )
    curves = load(root, made.params(), frame).curves
    assert set(curves["moe_kd"]["value"]) == {2.0}
    assert set(curves["shared_expert_kd"]["value"]) != {2.0}


def test_gallery_takes_the_kinds_in_turn(root: Path) -> None:
    inputs = load(root, made.params(), EMPTY)
    tags = [inputs.pictures["teacher"][i].tag for i in chosen(inputs)]
    assert tags == ["single_object", "colors"] * 4


def test_gallery_repeats_no_prompt_while_there_are_others(root: Path) -> None:
    inputs = load(root, made.params(), EMPTY)
    pictures = inputs.pictures["teacher"]
    same = [p.model_copy(update={"prompt": "a red digit 0"}) if i < 4 else p for i, p in enumerate(pictures)]
    shown = chosen(dataclasses.replace(inputs, pictures={**inputs.pictures, "teacher": same}))
    assert [same[i].prompt for i in shown].count("a red digit 0") == 1
    everything = [p.model_copy(update={"prompt": "a red digit 0"}) for p in pictures]
    assert len(chosen(dataclasses.replace(inputs, pictures={**inputs.pictures, "teacher": everything}))) == len(shown)


def test_plots_are_drawn_in_the_font_that_comes_with_matplotlib(root: Path) -> None:
    for weight in ("normal", "bold"):
        found = font_manager.findfont(font_manager.FontProperties(family=plot_style.FONT, weight=weight))
        assert Path(found).is_relative_to(matplotlib.get_data_path())


def test_without_mob_levels_the_report_ends_at_l(root: Path) -> None:
    params = made.params()
    models = {name: params.models[name] for name in ("teacher", "shared", "L")}
    params = params.model_copy(update={"mob": params.mob.model_copy(update={"levels": {}}), "models": models})
    report.build(root, params, EMPTY)
    assert list(markdown_rows(root)) == ["Teacher (dense)", "Shared experts only", "MoE-L"]
    assert not (root / "reports" / "figures" / "block_use.svg").exists()


def test_pictures_that_nobody_judged_have_no_accuracy(root: Path) -> None:
    params = made.params()
    params = params.model_copy(update={"eval": params.eval.model_copy(update={"classifier": None})})
    with pytest.raises(DataError, match=r"evaluations/teacher\.json: judged is there, .* eval\.classifier"):
        report.build(root, params, EMPTY)
    for path in (root / "data" / "evaluations").glob("*.json"):
        change(path, judged=None)
    for path in (root / "data" / "evaluations").glob("*/pictures.jsonl"):
        lines = [
            json.dumps(json.loads(line) | {"tag": "caption", "correct": None}) for line in path.read_text().splitlines()
        ]
        path.write_text("\n".join(lines))
    (root / "reports" / "stages" / "evaluator.json").write_text("{}")
    report.build(root, params, EMPTY)
    page, markdown = (outputs(root)[f"reports/{name}"].decode() for name in ("index.html", "report.md"))
    assert all("Nobody judged the pictures" in text for text in (page, markdown))
    assert not any(text in page for text in ("<th>FID ↓", 'class="right"', "Accuracy by kind"))
    assert not any(text in markdown for text in ("| ÷ teacher | FID", "Accuracy"))
    assert [len(row) for row in markdown_rows(root).values()] == [8] * 6


@pytest.mark.parametrize(("loss", "mark", "verdict"), [(1e-9, "short", "not lower"), (9.0, "holds", "lower")])
def test_the_sparse_model_is_held_against_ffns_cut_to_its_active_width(
    root: Path, loss: float, mark: str, verdict: str
) -> None:
    params = made.params()
    kd = params.kd.moe.model_copy(update={"train": ("all",), "rates": {}})
    cut = BaselineConfig(method="diff_pruning", ratio=1.5, kd=kd)
    wide = BaselineConfig(method="diff_pruning", ratio=2.0, kd=kd)
    model = params.models["S"].model_copy(update={"checkpoint": "data/checkpoints/baselines/cut"})
    update = {"models": {**params.models, "cut": model, "wide": model}, "baselines": {"cut": cut, "wide": wide}}
    params = params.model_copy(update=update)
    latency = json.loads((root / "reports" / "latency.json").read_text())["models"]
    change(root / "reports" / "latency.json", models=latency | {"cut": latency["S"], "wide": latency["S"]})
    own = json.loads((root / "data" / "evaluations" / "S.json").read_text())
    for name in ("cut", "wide"):
        for place in ("images", "evaluations"):
            shutil.copytree(root / "data" / place / "S", root / "data" / place / name)
        (root / "data" / "evaluations" / f"{name}.json").write_text(json.dumps({**own, "kd_loss": loss}))
        for part in ("stages", "curves"):
            for file in (root / "reports" / part).glob("moe_kd.*"):
                shutil.copy(file, file.with_name(f"baseline-{name}{file.suffix}"))
    found = [f for f in report_findings.findings(load(root, params, EMPTY)) if "same active width" in f.text]
    assert [f.mark for f in found] == [mark]
    assert f"of MoE-L is {verdict} than that of FFNs cut to the same active width, r = 1.5 (cut," in found[0].text
    report.build(root, params, EMPTY)
    assert "Baseline wide" in (root / "reports" / "index.html").read_text()


def test_a_baseline_is_a_row_but_no_level(root: Path) -> None:
    params = made.params()
    lite = params.models["S"].model_copy(update={"checkpoint": "data/baselines/lite"})
    params = params.model_copy(update={"models": {**params.models, "lite": lite}})
    for place in ("images", "evaluations"):
        shutil.copytree(root / "data" / place / "S", root / "data" / place / "lite")
    own = json.loads((root / "data" / "evaluations" / "S.json").read_text())
    # Its loss is out of the levels' order, and no finding about levels minds.
    own |= {
        "expert_use": {},
        "expert_use_by_timestep": {},
        "block_use": {},
        "block_use_by_timestep": {},
        "kd_loss": 1e-9,
    }
    (root / "data" / "evaluations" / "lite.json").write_text(json.dumps(own))
    latency = json.loads((root / "reports" / "latency.json").read_text())["models"]
    change(root / "reports" / "latency.json", models=latency | {"lite": latency["S"]})
    before = [f.text for f in report_findings.findings(load(root, made.params(), EMPTY))]
    report.build(root, params, EMPTY)
    assert list(markdown_rows(root))[-1] == "lite (baseline)"
    assert [f.text for f in report_findings.findings(load(root, params, EMPTY))] == before


@pytest.mark.parametrize(
    ("value", "text"), [(1_903_424, "1.90 M"), (11.9e9, "11.9 B"), (905_216, "905 k"), (12, "12.0")]
)
def test_parameter_counts_have_units(value: float, text: str) -> None:
    assert report_table.parameters(value) == text
