"""Pictures and tables of runs and of data. Needs matplotlib (pip install matplotlib).

    python tools/plots.py curves RUN...                 losses and validation, in curves.svg
    python tools/plots.py table RUN...                  test figures, as a Markdown table
    python tools/plots.py figures FOLDER                the figures of the README
    python tools/plots.py sheet FOLDER FILE.png         clips of a prepared folder with their texts

RUN is a run folder of train.py.
"""
# The tools run from a checkout: the core is one folder up.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import os
import re
import statistics
import textwrap
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from allinone import SIZES, AllInOne, Config, UserError, check_positive, printable, run_main
from data import (BENCHMARKS, InputSpec, VideoTextDataset, benchmark_of, captions_of,
                  read_answers)
from rolling import roll_groups, roll_tokens
from tools.report import record_attention

os.environ.setdefault("SOURCE_DATE_EPOCH", "0")     # no date in a file: same input, same file

try:
    import matplotlib
    from matplotlib.animation import FuncAnimation
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("plots.py needs matplotlib: pip install matplotlib")

matplotlib.rcParams.update({
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "patch.linewidth": 0.5,
    "savefig.dpi": 150,
    "svg.hashsalt": "same input, same file"
})


def new_figure(height):
    """7 inches wide, on white."""
    return Figure((7, height), layout="constrained", facecolor="white")


def save(figure, path):
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    print(printable(path))


# ---- runs ----------------------------------------------------------------------------------------


def read_run(folder):
    """(config, log lines, test figures or {}) of a run folder."""
    folder = Path(folder)
    test = folder / "test.json"
    try:
        config = json.loads((folder / "config.json").read_text())
        figures = json.loads(test.read_text()) if test.exists() else {}
        with open(folder / "metrics.jsonl") as file:        # its last line may be half a line
            log = [json.loads(line) for line in file if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run of train.py: {error}") from None
    return config, log, figures


LOSSES = {"vqa", "action", "choice", "vcr", "contrast", "rank", "matching", "mlm"}
METRICS = {benchmark.metric for benchmark in BENCHMARKS.values()}


def draw_curves(folders):
    """Training losses, dotted those of a guess; below, the main metric on validation."""
    figure = new_figure(5)
    above, below = figure.subplots(2, sharex=True)
    above.set_title("training loss in nats (dotted: the loss of a guess)")
    below.set_title("validation in percent")
    below.set_xlabel("optimiser step")
    for folder in folders:
        _, log, _ = read_run(folder)
        if not log:
            raise UserError(f"{folder} has logged nothing yet; let train.py go on")
        run = Path(folder).resolve().name
        curves = defaultdict(list)
        for line in log:
            for name, value in line.get("val", line).items():
                curves[name].append((line["step"], value))
        for axes, names in ((above, LOSSES), (below, METRICS)):
            for name in sorted(curves.keys() & names):
                axes.plot(*zip(*curves[name]), marker=".", label=f"{run}: {name}")
        for name, guess in log[0].get("chance", {}).items():
            if name in curves:
                above.axhline(guess, color="gray", linestyle=":")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.legend()
    return figure


def figures_of(test):
    """{metric or question type: {"accuracy", and baselines where they are known}}, in percent."""
    figures = {name: {"accuracy": value} for name, value in test["metrics"].items()}
    # Of all rows: accuracy, but R@1 in retrieval, which comes first there.
    over_all = "accuracy" if "accuracy" in figures else next(iter(figures))
    for row in test["table"]:
        figures[over_all if row["type"] == "all" else row["type"]] = row
    if "Q->AR" in figures:
        figures["Q->AR"]["chance"] = 100 / 16               # two questions with four options each
    return figures


def group_runs(folders):
    """{(n, benchmark, its n-th figure, settings): {seed: a value of figures_of}}. settings: pairs
    of texts, without the seed; in the path of --init also without the layout."""
    groups = defaultdict(dict)
    for folder in sorted(folders):
        config, _, test = read_run(folder)
        if not test:
            print(printable(f"{folder} has no test figures and is left out"), file=sys.stderr)
        config |= config.pop("model") | config.pop("recipe")
        seed = config.pop("seed")
        init = (config["init"] or "-").removeprefix("runs/")
        init = re.sub(rf"\bs{seed}\b", "sSEED", init)
        config["init"] = re.sub(rf"\b{config['roll']}\b", "ROLL", init)
        settings = frozenset((name, str(value)) for name, value in config.items())
        for benchmark in test:
            for n, (name, row) in enumerate(figures_of(test[benchmark]).items()):
                seeds = groups[n, benchmark, name, settings]
                if seed in seeds:
                    raise UserError(f"{folder}: another run of these settings has seed {seed} too; "
                                    "leave one of them out")
                seeds[seed] = row
    if not groups:
        raise UserError("none of these runs has a test.json; let train.py finish")
    return groups


BASELINES = ("chance", "majority", "order-blind")


def table_rows(groups):
    """Lists of texts, the heads first: of one benchmark the first 12 figures, of several the main
    ones. Columns without a value are left out."""
    seen = defaultdict(set)
    for _, benchmark, _, settings in groups:
        for name, value in settings:
            seen[benchmark, name].add(value)
    varies = sorted({name for (_, name), values in seen.items() if len(values) > 1})
    most = 12 if len({benchmark for _, benchmark, _, _ in groups}) == 1 else 1
    heads = ["benchmark", "figure", *varies, "runs", "test", "range", *BASELINES, "paper", "rerun"]
    rows = []
    for key in sorted(groups, key=lambda key: key[0]):      # one figure of all groups, the next
        n, benchmark, figure, settings = key
        if n == most:
            break
        runs = list(groups[key].values())
        values = [row["accuracy"] for row in runs]
        cells = [benchmark, figure]
        cells += map(dict(settings).get, varies)
        cells += [str(len(runs)), mean_std(values)]
        cells.append(f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else "")
        cells += [mean_std([runs[0].get(name)]) for name in BASELINES]
        is_base = dict(settings).get("width") == str(SIZES["base"].width)
        if n == 0 and is_base and benchmark in BENCHMARKS:      # whose figures are published
            cells += [BENCHMARKS[benchmark].paper, BENCHMARKS[benchmark].rerun]
        rows.append(cells + [""] * (len(heads) - len(cells)))
    filled = [n for n, column in enumerate(zip(*rows)) if any(column)]
    return [[cells[n] for n in filled] for cells in (heads, ["---"] * len(heads), *rows)]


def mean_std(values):
    """"50.0" of one value, "50.0 ± 1.2" of several, "" of None."""
    if None in values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


# ---- the figures of the README -------------------------------------------------------------------

COLORS = ListedColormap((
    "#dfe3e6",      # 0: padding, unused
    "#0072b2",      # 1 to 3: frames 0 to 2, in colors that color-blind readers can tell apart
    "#e69f00",
    "#009e73",
    "#7d868f",      # 4: words
))


def draw_tokens(axes, numbers, title):
    """A square for each token; numbers (rows, cols): its color."""
    axes.pcolormesh(numbers, cmap=COLORS, vmin=0, vmax=4, edgecolors="white", rasterized=True)
    axes.set(xticks=[], yticks=[], frame_on=False)
    axes.set_aspect("equal")
    axes.set_title(title)
    axes.invert_yaxis()


def frame_numbers(T, N):
    """(1, T, N, 1): tokens that hold the color of their frame."""
    return torch.arange(1, T + 1).view(1, T, 1, 1).expand(1, T, N, 1)


def draw_roll(T=3, side=14):
    """The frame that each patch comes from, before and after one roll."""
    before = frame_numbers(T, 1 + side * side)
    after = roll_tokens(before, *roll_groups(side, side))
    figure = new_figure(4.9)
    above, below = figure.subplots(2, T)
    for t in range(T):
        draw_tokens(above[t], before[0, t, 1:, 0].view(side, side), f"frame {t}, before")
        draw_tokens(below[t], after[0, t, 1:, 0].view(side, side), f"frame {t}, after")
    return figure


def draw_sequence(words=5, padding=2):
    """The joint sequence of each frame after one roll; and which token attends to which: where the
    attention in the first block of a toy model is not 0."""
    config = SIZES["toy"]
    T = config.frames
    L = words + padding
    N = 1 + config.grid ** 2
    model = AllInOne(config).eval()
    with torch.inference_mode(), record_attention(model) as maps:
        video = torch.randn(1, T, N, config.width)
        input_ids = torch.zeros(1, L, dtype=torch.long)
        model.joint(video, input_ids, torch.arange(L)[None] < words)
    attends = (maps[0].sum(1) > 0).long()                               # (T, S, S)
    tokens = roll_tokens(frame_numbers(T, N), model.forward_group, model.backward_group)
    text = torch.tensor([4] * words + [0] * padding).expand(T, L)
    sequence = torch.cat([text, tokens[0, :, :, 0]], dim=1)             # (T, S)
    mask = torch.block_diag(*attends)                                   # (T*S, T*S)
    figure = new_figure(5.6)
    above, below = figure.subplots(2, height_ratios=(1, 4))
    draw_tokens(above, sequence, "A sequence for each frame, after one roll")
    draw_tokens(below, mask, "Attention stays inside a frame, and padding gets none")
    frames = [f"frame {t}" for t in range(T)]
    above.set_xticks([2.5, 6, 7.5, 16], ["words", "pad", "CLS",
                                         "patches, in the color of the frame they come from"])
    above.set_yticks([0.5, 1.5, 2.5], frames)
    below.set_xticks([12, 36, 60], frames)
    below.set_yticks([12, 36, 60], frames)
    below.set(xlabel="keys", ylabel="queries")
    return figure


def spread_states(T=7, side=6):
    """[(title, (T, side, side))]: 1 where a patch holds something of the middle frame, while tokens
    roll and attention mixes all tokens of a frame."""
    groups = roll_groups(side, side)
    holds = torch.zeros(1, T, 1 + side * side, 1, dtype=torch.long)
    holds[:, T // 2] = 1
    states = [("at the start", holds)]
    for block in range(1, 1 + T // 2):
        holds = roll_tokens(holds, *groups)
        states.append((f"block {block} rolls tokens", holds))
        holds = holds.amax(2, keepdim=True).expand_as(holds)
        states.append((f"block {block} attends inside each frame", holds))
    return [(title, x[0, :, 1:, 0].view(T, side, side)) for title, x in states]


def save_animation(path):
    states = spread_states()
    figure = new_figure(1.7)
    row = figure.subplots(1, 7)

    def draw(n):
        title, frames = states[n]
        figure.suptitle(f"Tokens that hold information from frame 3: {title}")
        for t, axes in enumerate(row):
            axes.clear()
            draw_tokens(axes, frames[t], f"frame {t}")

    FuncAnimation(figure, draw, len(states)).save(path, "pillow", fps=0.7, dpi=100)
    print(printable(path))


# ---- a contact sheet -----------------------------------------------------------------------------


def describe(row, answers):
    """The texts of a row, by names, not by numbers; ✓ marks the answer."""
    if "label" in row:
        return [f"✓ {answers[row['label']]}"]
    if "options" in row:
        lines = [f"   {option}" for option in row["options"]]
        lines[row["answer"]] = lines[row["answer"]].replace("  ", "✓", 1)
        return [row.get("question", ""), *lines]
    if "question" in row:
        return [row["question"], f"✓ {row['answer']}"]
    return captions_of(row)[:3]


def draw_sheet(folder, split, count):
    """`count` clips at random, their T frames as evaluation sees them, and their texts."""
    _, benchmark = benchmark_of(folder)
    answers = read_answers(folder) if benchmark.task == "action" else []
    config = Config(image=128, frames=benchmark.frames)
    spec = InputSpec(replace(benchmark, views=1), config, None, answers)
    dataset = VideoTextDataset(folder, split, spec)
    chosen = {}
    for i in np.random.default_rng(0).permutation(len(dataset)):
        if len(chosen) < count:
            row = dataset.rows[i]
            chosen.setdefault(row["video"], row)
    figure = new_figure(1.2 * len(chosen))
    for n, row in enumerate(chosen.values(), 1):
        frames = F.pad(dataset.load_frames(row, None), (0, 4), value=255)    # a gap
        axes = figure.add_subplot(len(chosen), 1, n, anchor="W")
        axes.imshow(torch.cat([*frames], dim=2).permute(1, 2, 0).numpy())
        axes.axis("off")
        lines = [textwrap.fill(line, 50) for line in describe(row, answers)]
        text = "\n".join(lines)
        axes.text(1.02, 1, text, va="top", transform=axes.transAxes, parse_math=False)
    return figure


# ---- python tools/plots.py -----------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("curves", "table", "figures", "sheet"))
    add("paths", nargs="+", metavar="PATH")
    add("--out", default="curves.svg", help="where to draw curves (default curves.svg)")
    add("--count", type=int, default=8, help="clips of a sheet (default 8)")
    add("--split", default="test", help="of a sheet (default test)")
    args = parser.parse_args()
    check_positive(args, "count")
    match [args.command, *args.paths]:
        case ["curves", *runs]:
            save(draw_curves(runs), args.out)
        case ["table", *runs]:
            for cells in table_rows(group_runs(runs)):
                print(printable(f"| {' | '.join(cells)} |"))
        case ["figures", folder]:
            save(draw_roll(), f"{folder}/roll.svg")
            save(draw_sequence(), f"{folder}/sequence.svg")
            save_animation(f"{folder}/spread.gif")
        case ["sheet", folder, file]:
            save(draw_sheet(folder, args.split, args.count), file)
        case _:
            parser.error("figures needs a folder, sheet a folder and a file")


if __name__ == "__main__":
    run_main("plots.py", main)
