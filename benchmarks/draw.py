"""Draws the README's tables and the plots beside them from the records, and says which records it leaves out.

    python -m benchmarks.draw [--results benchmarks/results] [--readme README.md] [--plots benchmarks/results] [--check]

The tables take the place of what is between two markers in the README, a pair for each section. Needs the extra `plots`. The
same records give the same bytes, so that `--check` can tell whether README and plots are what would be drawn now (the tables
alone, if matplotlib is missing).
"""

import argparse
import importlib.util
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECTIONS = {  # of the README, by the name in their markers: the kinds of records that are there
    "small world": ("small_world", "small_world_training"),
    "speed": ("compare_diffusers", "generate", "first_video", "options"),
}
SIDES = {"ours": "#3b82c4", "diffusers": "#9a9a9a"}  # and the colour of each
STAGES = ("whole", "step", "decode")
PARTS = {  # of a request, and the colour of each
    "load": "#c7a252",
    "encode": "#4fa8a8",
    "prefill": "#5aa469",
    "denoise": "#3b82c4",
    "decode": "#c4623b",
    "decode_sound": "#b5527f",
    "write": "#8d6cc0",
    "rest": "#9a9a9a",
}
GRAY = "#767676"  # as far from white as from black
STYLE = {
    "svg.hashsalt": "cosmos3_jax",  # else ids are random
    "svg.fonttype": "none",  # text, not outlines: a tenth of the size
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GRAY),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top", "axes.spines.bottom"), False),
    **dict.fromkeys(("xtick.bottom", "xtick.labelbottom", "ytick.left", "legend.frameon"), False),
}

Records = dict[str, dict[str, Any]]
"""By name: that of the file, without its suffix."""


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=Path("benchmarks/results"), help="the folder of records (benchmarks/results)")
    add("--readme", type=Path, default=Path("README.md"), help="the file with the markers (README.md)")
    add("--plots", type=Path, default=Path("benchmarks/results"), help="the folder of plots (benchmarks/results)")
    add("--check", action="store_true", help="write nothing; exit code 1 if anything would change")
    arguments = parser.parse_args(argv)
    without_plots = arguments.check and not _can_plot()
    if without_plots:
        print("matplotlib is missing: the plots are not checked")
    files = drawn(arguments.results, arguments.readme, arguments.plots, without_plots=without_plots)
    if arguments.check:
        stale = [str(file) for file, content in files.items() if not file.is_file() or file.read_bytes() != content]
        if stale:
            raise SystemExit(f"not what the records say: {', '.join(stale)}; run python -m benchmarks.draw")
        return
    arguments.plots.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        file.write_bytes(content)
        print(file)


def drawn(results: Path, readme: Path, plots: Path, *, without_plots: bool = False) -> dict[Path, bytes]:
    """What the README and each plot should hold."""
    records = read(results)
    beside = Path(os.path.relpath(plots, readme.parent)).as_posix()
    text = readme.read_bytes().decode()
    for name in SECTIONS:
        text = replaced(text, name, section(name, records, beside), readme)
    files = {readme: text.encode()}
    if without_plots:
        return files
    if not _can_plot():
        raise SystemExit('plots need matplotlib; pip install -e ".[plots]"')
    return files | {plots / name: svg(name, records) for name in plot_names(records)}


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def read(results: Path) -> Records:
    """The records that are drawn, in the order of their names."""
    records = {}
    for file in sorted(results.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        if any(found.get("kind") in kinds for kinds in SECTIONS.values()):
            records[file.stem] = found
        else:
            print(f"{file}: not drawn, of kind {found.get('kind', 'none')}")
    return records


def of_kind(records: Records, kind: str) -> Records:
    """The records of one kind."""
    return {name: each for name, each in records.items() if each["kind"] == kind}


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a section of the README."""
    return f"<!-- {name}: drawn by benchmarks/draw.py -->", f"<!-- end of {name} -->"


def replaced(text: str, name: str, section: str, readme: Path) -> str:
    """The README's text with `section` between the markers of that name."""
    begin, end = markers(name)
    before, found, rest = text.partition(begin)
    _, ends, after = rest.partition(end)
    if not found or not ends or begin in rest or end in after:
        raise SystemExit(f"{readme}: {begin!r} and {end!r} are expected once each, in this order")
    return f"{before}{begin}\n{section}{end}{after}"


def section(name: str, records: Records, plots: str) -> str:
    """The tables of a section as Markdown, each with its plots, which are in the folder `plots`."""
    parts = []
    for kind in SECTIONS[name]:
        if alike := of_kind(records, kind):
            shown = plot_names(alike) | picture_names(alike)
            parts += [TABLES[kind](alike), *(f"![{title}]({plots}/{file})" for file, title in shown.items())]
    return "".join(f"{part}\n\n" for part in parts)


def plot_names(records: Records) -> dict[str, str]:
    """The files to plot, and what each shows in words: one for every comparison, one for all requests together."""
    names = {
        f"{name}.svg": f"Seconds by stage, ours and diffusers': {what(each)}"
        for name, each in of_kind(records, "compare_diffusers").items()
    }
    return names | ({"requests.svg": "The stages of a request"} if of_kind(records, "generate") else {})


def picture_names(records: Records) -> dict[str, str]:
    """The pictures that were written beside a record when it was measured, and what each shows in words."""
    return {each["sheet"]: "Prompts and videos" for each in records.values() if "sheet" in each}


def small_world_table(records: Records) -> str:
    """How often the built-in checkpoint did what it was told."""
    return "\n\n".join(map(_marks, records.values()))


def _marks(each: dict[str, Any]) -> str:
    steps, scale, shift = (each[name] for name in ("num_inference_steps", "guidance_scale", "flow_shift"))
    return _table(
        "The share of prompts with a right result, judged from its frames and its sound alone (`python -m "
        f"benchmarks.small_world.measure`): {each['checkpoint']}, {steps} steps, guidance scale {scale:g} where none is told, "
        f"flow shift {shift:g}, on {where(each)}. All that is told: also size, speed and background, where the prompt names "
        "them. Pitch: within a semitone of that of the first shape. An image gives all but the motion:",
        ["right", *next(iter(each["rows"].values()))],
        [[name, *(f"{share:.0f} %" for share in row.values())] for name, row in each["rows"].items()],
    )


def small_world_training_table(records: Records) -> str:
    """How long it was trained."""
    return "\n\n".join(
        _table(
            f"Minutes of training, on {where(each)} (`python -m benchmarks.small_world.train WORK`):",
            [*each["seconds"], "all"],
            [[f"{value / 60:.0f}" for value in (*each["seconds"].values(), sum(each["seconds"].values()))]],
        )
        for each in records.values()
    )


def compare_table(records: Records) -> str:
    """Each stage of each comparison."""
    rows = []
    for each in records.values():
        about, apart = [what(each), where(each, "diffusers", "torch")], f"{each['difference']:.0e}"
        for stage in STAGES:
            sides = (spread(each[side][stage]) for side in SIDES)
            rows.append([*about, stage, *sides, f"{each['ratio'][stage]:.2f}", apart])
            about, apart = ["", ""], ""  # once for all stages
    return _table(
        "Seconds beside diffusers, same weights and request in turns, median (least to greatest). The ratio is that of "
        "the medians; how far the latents are apart is in parts of their deviation (`python -m benchmarks.compare_diffusers`):",
        ["request", "on", "stage", "ours, s", "diffusers, s", "ratio", "latents apart"],
        rows,
    )


def generate_table(records: Records) -> str:
    """Each request, stage by stage."""
    rows = []
    for each in records.values():
        stages, shares = each["stages"], each["shares"] | {"whole": each["share_of_matrix_product"]}
        shares["step"] = shares.get("denoise")
        cells = [seconds(stages[stage]["median"], shares.get(stage)) for stage in ("prefill", "step", "decode", "write")]
        whole = f"{spread(stages['whole'])}, {shares['whole']:.0%}"
        first = f"{seconds(each['first']['whole'])}, {seconds(each['compiled_first']['seconds'])} of it"
        rows.append([what(each), where(each), *cells, whole, first, memory(each["peak_memory"])])
    return _table(
        "Seconds of a request from the prompt to the file, median (and least to greatest), with the share of a large matrix "
        "product's rate on the same device. The first request is a process's own, and how much of it is tracing and compiling "
        "(`python -m benchmarks.generate`):",
        ["request", "on", "prefill", "a step", "decode", "write", "whole", "first, compiling", "GB at most"],
        rows,
    )


def first_video_table(records: Records) -> str:
    """A newcomer's wait."""
    ways = {"without_cache": "without a cache", "cold": "cold", "warm": "warm"}
    return _table(
        "Seconds until a newcomer has a video of the built-in checkpoint, from the start of the process to its end, without a "
        "cache of compiled programs, with an empty one (cold) and a filled one (warm) (`python -m benchmarks.first_video`):",
        ["on", *ways.values()],
        [[where(each), *(spread(each[way]) for way in ways)] for each in records.values()],
    )


def options_table(records: Records) -> str:
    """What each option that is not exact saves and changes."""
    rows = []
    for each in records.values():
        about = [what(each), where(each)]
        for row in each["rows"]:
            steps, apart = str(row["computed_steps"]), f"{row['difference']:.2g}"
            rows.append([*about, row["option"], seconds(row["seconds"]), f"{row['of_the_time']:.2f}", steps, apart])
            about = ["", ""]
    return _table(
        "What the options that are not exact save and change, with random weights: seconds of denoising, their share of those "
        "without an option, the steps that computed a velocity, and how far the latents are from those without, in parts of "
        "their deviation; the other dtype as a measure of that (`python -m benchmarks.options`):",
        ["request", "on", "option", "denoise, s", "of the time", "steps computed", "latents apart"],
        rows,
    )


TABLES = {
    "small_world": small_world_table,
    "small_world_training": small_world_training_table,
    "compare_diffusers": compare_table,
    "generate": generate_table,
    "first_video": first_video_table,
    "options": options_table,
}


def _table(caption: str, titles: list[str], rows: list[list[str]]) -> str:
    lines = [caption, "", f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def what(record: dict[str, Any]) -> str:
    """Model, size, steps, dtype and mesh of a record."""
    request, mesh = record["request"], record.get("mesh", {"cfg": 1, "tp": 1})
    frames, steps = request["num_frames"], request["num_inference_steps"]
    size = f"{frames} frame{'s' * (frames > 1)} of {request['height']}x{request['width']}"
    words = [Path(record["model"]).name, size, f"{steps} steps", record["dtype"]]
    return ", ".join(words + ([f"--cfg {mesh['cfg']} --tp {mesh['tp']}"] if mesh["cfg"] * mesh["tp"] > 1 else []))


def where(record: dict[str, Any], *packages: str) -> str:
    """Hardware, versions and date of a record."""
    hardware, versions = record["hardware"], record["versions"]
    devices = hardware["host"] if hardware["platform"] == "cpu" else hardware["devices"]
    return ", ".join([devices, *(f"{package} {versions[package]}" for package in ("jax", *packages)), record["date"]])


def seconds(value: float, share: float | None = None) -> str:
    """A number, and what share of the device's rate was had meanwhile."""
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 100 else 1
    return f"{value:.{digits}f}" + ("" if share is None else f", {share:.0%}")


def spread(values: dict[str, float]) -> str:
    """Median, least and greatest."""
    return f"{seconds(values['median'])} ({seconds(values['least'])} to {seconds(values['greatest'])})"


def memory(peak: dict[str, int]) -> str:
    """The peak on a device, or in the host's memory where devices do not tell theirs."""
    return f"{peak['device'] / 1e9:.1f}" if peak["device"] else f"{peak['host'] / 1e9:.1f} (host)"


def svg(name: str, records: Records) -> bytes:
    """A plot, to be seen on light and on dark."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        record = records.get(name.removesuffix(".svg"))
        figure = stacks(of_kind(records, "generate")) if record is None else bars(record)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def bars(record: dict[str, Any]) -> "Figure":
    """Seconds by stage, ours above diffusers'. Each stage is drawn to its own scale: a step is a fraction of the whole."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.6 * len(STAGES)), layout="constrained")
    axes = figure.subplots()
    slower = [max(record[side][stage]["median"] for side in SIDES) for stage in STAGES]
    for place, (side, color) in zip((-0.2, 0.2), SIDES.items(), strict=True):
        medians = [record[side][stage]["median"] for stage in STAGES]
        lengths = [median / most for median, most in zip(medians, slower, strict=True)]
        drawn = axes.barh([row + place for row in range(len(STAGES))], lengths, height=0.36, color=color, label=side)
        axes.bar_label(drawn, [f"{seconds(median)} s" for median in medians], padding=4)
    axes.set_yticks(range(len(STAGES)), STAGES)
    _finish(figure, what(record))
    return figure


def stacks(records: Records) -> "Figure":
    """The stages of a request as parts of the whole, a bar for each record."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.6 * len(records)), layout="constrained")
    axes = figure.subplots()
    ends = [0.0] * len(records)
    for part, color in PARTS.items():
        lengths = [parts(each).get(part, 0.0) for each in records.values()]
        if any(lengths):
            axes.barh(range(len(records)), lengths, left=ends, height=0.4, color=color, label=part)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for row, each in enumerate(records.values()):
        axes.text(0, row - 0.28, what(each), va="bottom")
        axes.text(1.01, row, f"{seconds(each['stages']['whole']['median'])} s", va="center")
    axes.set_yticks([])
    _finish(figure, "a request, stage by stage")
    return figure


def parts(record: dict[str, Any]) -> dict[str, float]:
    """Each stage's part of a request. What takes less than a hundredth, and what is between the stages, is the rest."""
    medians = {stage: values["median"] for stage, values in record["stages"].items()}
    stages = {stage: medians[stage] for stage in PARTS if stage in medians}
    whole = max(medians["whole"], sum(stages.values()))  # medians do not add up
    shown = {stage: taken / whole for stage, taken in stages.items() if taken >= 0.01 * whole}
    return shown | {"rest": 1 - sum(shown.values())}


def _finish(figure: "Figure", title: str) -> None:
    """The first row on top, room for the numbers at the right, and what the colours mean."""
    (axes,) = figure.axes
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize="small")


if __name__ == "__main__":
    main()
