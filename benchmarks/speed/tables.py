"""What a run of `benchmarks.speed` found, as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
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


def markdown(report: dict[str, Any], name: str) -> str:
    """All sections that are there."""
    machine = report["machine"]
    parts = [
        "# Speed\n",
        f"{machine['device']}, {machine['threads']} threads; torch {machine['torch']}, diffusers {machine['diffusers']}, transformers"
        f" {machine['transformers']}, Python {machine['python']}. Medians over rounds in which all ways run in turn; ratios are"
        " taken within a round, quartiles in brackets."
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
            f"{run['precision']}, {run['samples']} sample(s) of {run['image_tokens']} image and {run['text_tokens']} text tokens, routing"
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
    yield f"## One denoising step and a sampling of {rows[0]['steps']}, bf16, over the dense model's\n"
    ways = list(rows[0]["ways"])
    head = ["model", "samples", *(f"{way}: {what}" for way in ways for what in ("step", "sampling", "graphs", "GB"))]
    body = []
    for row in rows:
        cells = []
        for way in row["ways"].values():
            cells += [f"{way[f'{name}_s']:.3g} s, {way[f'{name}_ratio']:.3f}" for name in ("step", "sampling")]
            cells += [str(way["recorded"] or ""), f"{way['resident'] / 1e9:.1f}"]
        body.append([row["model"], str(row["samples"]), *cells])
    yield _table(head, body)


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
