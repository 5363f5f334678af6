"""What a run of `benchmarks.speed` found, as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.layer import ARITHMETIC

LINES = {"expected_ratio": "arithmetic", "ratio": "measured"}
AXES = {
    "tokens": "tokens",
    "experts": "experts",
    "top_k": "active experts",
    "batch": "samples of a batch (XS)",
    "workers": "workers, a KD step",
}


PAPER_LATENCY = {"dense": "1", "L": "0.84", "M": "0.68", "S": "0.45", "XS": "0.41"}
"""Of a whole sampling over the dense model's (Table 1)."""
GOALS = {"L": "0.72", "M": "0.60", "S": "0.45", "XS": "0.36"}


def markdown(report: dict[str, Any], name: str) -> str:
    """All sections that are there."""
    machine = report["machine"]
    parts = [
        "# Speed\n",
        f"{machine['device']}, {machine['threads']} threads; torch {machine['torch']}, diffusers {machine['diffusers']}, transformers"
        f" {machine['transformers']}, Python {machine['python']}. Medians over rounds in which all ways run in turn; ratios are"
        " taken within a round, quartiles in brackets, but of samplings and of workers, which run one after the other."
        f" Made by `python -m benchmarks.speed --device {name.rpartition('-')[2]}`.\n",
    ]
    for section, make in (
        ("layer", _layer),
        ("models", _models),
        ("sampling", _sampling),
        ("kd_step", _kd_step),
        ("memory", _memory),
        ("growth", _growth),
    ):
        if section in report:
            parts += [*make(report[section])]
    if took := report.get("seconds"):
        parts.append("Seconds that it took: " + ", ".join(f"{name} {value}" for name, value in took.items()) + ".\n")
    if "growth" in report:
        parts.append(f"![how time grows]({name}.svg)\n")
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _spread(times: dict[str, float]) -> str:
    return f"{times['ratio']:.3f} ({times['ratio_low']:.3f} to {times['ratio_high']:.3f})"


def _layer(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"## The MoE FFN over the dense FFN, 3,072 wide, 1S12E2A (arithmetic {ARITHMETIC:.3f})\n"
    ways = list(dict.fromkeys(name for row in rows for name in row["times"] if name != "dense FFN"))
    head = ["tokens, precision, routing, passes", "dense FFN, s", *ways, "chosen"]
    body = []
    for row in rows:
        title = f"{row['tokens']}, {row['precision']}, {row['routing']} ({row['largest_load_over_mean']:g}), {row['passes']}"
        times = row["times"]
        cells = [_spread(times[way]) if way in times else "" for way in ways]
        body.append([title, f"{times['dense FFN']['median_s']:.3g}", *cells, row["choice"]])
    yield _table(head, body)
    yield "In brackets behind the routing: the most popular expert's tokens over the mean.\n"


def _models(runs: list[dict[str, Any]]) -> Iterator[str]:
    yield "## One denoising step over the dense model's\n"
    for run in runs:
        compiled = ", compiled" if run["compiled"] else ""
        yield (
            f"{run['precision']}, {run['width']} wide, {run['samples']} sample(s) of {run['image_tokens']} image and {run['text_tokens']} text"
            " tokens, routing"
            f" {run['routing']}{compiled}:\n"
        )
        head = [
            "model",
            "parameters, M",
            "seconds",
            "time over dense",
            "FLOPs over dense",
            "time over FLOPs",
            "largest load",
            "products, attention, else: s",
        ]
        body = []
        for name, row in run["models"].items():
            load = row["largest_load_over_mean"]
            sizes = [f"{row['parameters'] / 1e6:.0f}", f"{row['times']['median_s']:.3g}", _spread(row["times"])]
            ratios = [f"{row['flops_ratio']:.3f}", f"{row['time_over_flops']:.3f}"]
            seconds = ", ".join(f"{value:.3g}" for value in row["seconds_of"].values())
            body.append([name, *sizes, *ratios, "" if load is None else f"{load:g}", seconds])
        yield _table(head, body)


def _kd_step(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "## A distillation step over its parts timed alone\n"
    head = ["trained", "samples", "teacher forward, s", "student forward and backward, s", "step, s", "step over parts"]
    body = []
    for row in rows:
        seconds = [f"{row['seconds'][name]:.3g}" for name in ("teacher", "student", "step")]
        body.append(
            [f"{row['trained']}, {row['precision']}", str(row["samples"]), *seconds, f"{row['over_parts']:.3f}"]
        )
    yield _table(head, body)


def _sampling(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"## One denoising step and a sampling of {rows[0]['steps']}, bf16, over the dense model's; routing as random weights choose\n"
    ways = list(rows[0]["ways"])
    head = ["model", "samples", "paper's ratio", *_sampling_head(ways)]
    body = []
    for row in rows:
        cells = []
        for way in row["ways"].values():
            cells += [f"{way[f'{name}_s']:.3g} s, {way[f'{name}_ratio']:.3f}" for name in ("step", "sampling")]
            cells += [str(way["recorded"] or ""), f"{way['resident'] / 1e9:.1f}"]
        body.append([row["model"], str(row["samples"]), PAPER_LATENCY.get(row["model"], ""), *cells])
    yield _table(head, body)


def _sampling_head(ways: Iterable[str]) -> list[str]:
    return [f"{way}: {what}" for way in ways for what in ("step", "sampling", "graphs", "GB")]


def not_measured() -> str:
    """The GPU's table while there is none: the paper's ratios and the goals beside cells that say so."""
    rows = [
        [model, str(samples), PAPER_LATENCY.get(model, ""), GOALS.get(model, ""), *["not measured"] * 8]
        for samples in (1, 4)
        for model in ("dense", "L", "M", "S", "XS", "Lite", "Mini")
    ]
    parts = [
        "# Speed on a GPU\n",
        "No GPU was at hand: nothing here is measured. `make bench-gpu` writes this file anew, with the other sections of"
        " `python -m benchmarks.speed --device cuda`; this one by `python -m benchmarks.speed.tables`.\n",
        "## One denoising step and a sampling of 28, FLUX.1's size, 1024 x 1024, bf16, over the dense model's; routing as random weights choose\n",
        _table(["model", "samples", "paper's ratio", "goal", *_sampling_head(("compiled", "graphs"))], rows),
        "## The MoE FFN over the dense FFN, 3,072 wide, 1S12E2A (arithmetic 0.375)\n",
        _table(
            ["tokens, precision, passes", "goal", "ours", "best of the others"],
            [
                [f"{tokens}, {precision}, {passes}", "0.45" if tokens == 4608 else "", "not measured", "not measured"]
                for precision in ("float32", "bfloat16")
                for tokens, passes in (
                    (256, "forward"), (1024, "forward"), (4608, "forward"), (1024, "forward, backward"),
                )
            ],
        ),
        "## A distillation step\n",
        _table(
            ["what", "goal", "measured"],
            [
                ["over its parts timed alone", "1.05", "not measured"],
                ["model FLOPs utilisation", "45 %", "not measured"],
            ],
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def _memory(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "## Weights on the device, bf16, one sample\n"
    head = [
        "model",
        "all weights, MB",
        "with group offload: most at once, MB",
        "over all",
        "brought in a step, MB",
        "memory at most: all there, MB",
        "with group offload, MB",
    ]
    body = []
    for name, row in rows.items():
        sizes = {key: f"{value / 1e6:.0f}" for key, value in row.items()}
        share = f"{row['resident'] / row['weights']:.3f}"
        cells = [
            sizes["weights"],
            sizes["resident"],
            share,
            sizes["brought"],
            sizes["peak_all"],
            sizes["peak_offloaded"],
        ]
        body.append([name, *cells])
    yield _table(head, body)


def _growth(axes: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield "## How time grows\n"
    for axis, rows in axes.items():
        yield _table([AXES[axis], *(str(row["x"]) for row in rows)], [
            ["seconds", *(f"{row['seconds']:.3g}" for row in rows)],
            ["over the first", *(f"{row['ratio']:.2f}" for row in rows)],
            ["arithmetic", *(f"{row['expected_ratio']:.2f}" for row in rows)],
            *([["images a second", *(f"{row['images_per_second']:.2f}" for row in rows)]] if axis == "workers" else []),
        ])  # fmt: skip


def plot(report: dict[str, Any], target: Path) -> None:
    """The section `growth`, each axis beside its arithmetic."""
    # Here, as a rented GPU machine has torch and what reads models, no more.
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "speed"
    axes = report["growth"]
    figure, panels = plt.subplots(1, len(axes), figsize=(2.7 * len(axes), 3.2), layout="constrained")
    for panel, (axis, rows) in zip(panels, axes.items()):
        x = [row["x"] for row in rows]
        # Over the largest case: what is above the line is what small cases pay beside their arithmetic.
        for key, look in (("expected_ratio", {"color": "0.6", "linestyle": "--"}), ("ratio", {"marker": "o"})):
            panel.plot(x, [row[key] / rows[-1][key] for row in rows], label=LINES[key], **look)
        panel.set_xlabel(AXES[axis])
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time over the last case")
    panels[0].legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    Path("benchmarks/results/speed-cuda.md").write_text(not_measured())
