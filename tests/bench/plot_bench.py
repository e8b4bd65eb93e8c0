"""plot_bench.py - the plots of `make bench`: a roofline, and bars of time over the dense chain.

    plot_bench.py FOLDER [MODE]   FOLDER has raw.csv; MODE is panels, prepacked or rowmajor

Writes roofline.svg, .png, bars.svg and .png beside it. Needs matplotlib 3.6 or newer.
"""

import os
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import bench_shapes as shapes

STYLE = {
    "svg.hashsalt": "bench", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
}  # fmt: skip
COLORS = {
    "libmoe_panels": "#b2182b", "libmoe_prepacked": "#d6604d", "libmoe_rowmajor": "#ef8a62",
    "loop_onednn": "#2166ac", "omp_openblas": "#4393c3", "loop_openblas": "#92c5de",
    "torch_loop": "#7f7f7f", "ggml": "#bcbd22",
}  # fmt: skip
NAMES = {
    "libmoe_panels": "libmoe, panels", "libmoe_prepacked": "libmoe, prepacked",
    "libmoe_rowmajor": "libmoe, row-major", "loop_onednn": "experts over threads, oneDNN",
    "omp_openblas": "experts over threads, OpenBLAS",
    "loop_openblas": "loop over experts, OpenBLAS", "torch_loop": "loop over experts, PyTorch",
    "ggml": "ggml mul_mat_id",
}  # fmt: skip


def save(figure, folder, name):
    for ending in ("svg", "png"):
        extra = {"metadata": {"Date": None}} if ending == "svg" else {"dpi": 130}
        figure.savefig(os.path.join(folder, f"{name}.{ending}"), bbox_inches="tight", **extra)
    plt.close(figure)


def median_rate(rounds, peer):
    rates = [m.rate() for (name, *_), m in rounds.items() if name == peer]
    return statistics.median(rates) if rates else None


def points(rounds, peer):
    """(shape, pass, FLOP/byte, GFLOP/s) of a peer's balanced runs; the first run of each."""
    seen = set()
    for (name, shape, routing, direction, _), m in rounds.items():
        if name != peer or routing != "balanced" or (shape, direction) in seen:
            continue
        seen.add((shape, direction))
        work = shapes.flops(shape, direction)
        yield shape, direction, work / shapes.least_bytes(shape, direction), m.rate()


def roofline(rounds, folder, mode):
    peak, stream = median_rate(rounds, "fma_peak"), median_rate(rounds, "read_bandwidth")
    if not peak or not stream:
        return
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    mine_name = f"libmoe_{mode}"
    mine = list(points(rounds, mine_name))
    left, right = 0.35, 1.6 * max([64, *(p[2] for p in mine)])
    knee = peak / stream
    axes.plot([left, knee, right], [left * stream, peak, peak], color="black", linewidth=1.4)
    axes.text(right, peak * 1.05, f"FMA peak {peak:.0f} GFLOP/s", ha="right", va="bottom")
    axes.text(0.5 * knee, 0.53 * peak, f"read bandwidth {stream:.1f} GB/s", ha="right", va="bottom")
    for peer, color, label in (("dense_openblas", "#9e9e9e", "dense chain, OpenBLAS"),
                               (mine_name, COLORS[mine_name], NAMES[mine_name])):  # fmt: skip
        for direction, face in (("fwd", color), ("fwdbwd", "white")):
            own = [p for p in points(rounds, peer) if p[1] == direction]
            if own:
                axes.scatter([p[2] for p in own], [p[3] for p in own], s=42, facecolor=face,
                             edgecolor=color, linewidth=1.4, zorder=3,
                             label=f"{label}, {shapes.PASS_NAME[direction]}")  # fmt: skip
    for shape, direction, x, y in mine:
        axes.annotate(shape, (x, y), textcoords="offset points", fontsize=9,
                      xytext=(7, -4) if direction == "fwd" else (-7, -4),
                      ha="left" if direction == "fwd" else "right")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left, right * 1.1),
             xlabel="FLOP a byte: weights, their gradients and tokens once each",
             ylabel="GFLOP/s")  # fmt: skip
    axes.legend(loc="lower right", frameon=False)
    save(figure, folder, "roofline")


def bars(rounds, folder):
    runs = [(s, d) for d in ("fwd", "fwdbwd") for s in shapes.SHAPES
            if any(key[:4] == ("dense_openblas", s, "balanced", d) for key in rounds)]  # fmt: skip
    peers = [p for p in COLORS if any(key[0] == p for key in rounds)]
    if not runs:
        return
    figure, axes = plt.subplots(figsize=(1.6 + 1.05 * len(runs), 4.2))
    width = 0.84 / len(peers)
    for i, peer in enumerate(peers):
        values = [shapes.ratio(rounds, peer, "dense_openblas", s, d) for s, d in runs]
        places = [x - 0.42 + width * (i + 0.5) for x in range(len(runs))]
        found = [(x, v) for x, v in zip(places, values) if v is not None]
        axes.bar([x for x, _ in found], [v for _, v in found], width, color=COLORS[peer],
                 label=NAMES[peer])  # fmt: skip
    axes.axhline(1, color="black", linewidth=1)
    axes.set(yscale="log", ylabel="time over a dense chain of the same FLOPs",
             xticks=range(len(runs)),
             xticklabels=[f"{s}\n{'fwd' if d == 'fwd' else 'f + b'}" for s, d in runs])  # fmt: skip
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
             if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]  # fmt: skip
    axes.set_yticks(ticks)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    save(figure, folder, "bars")


def draw(rounds, folder, mode):
    with plt.rc_context(STYLE):
        roofline(rounds, folder, mode)
        bars(rounds, folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    draw(shapes.read_raw(os.path.join(sys.argv[1], "raw.csv")), sys.argv[1],
         sys.argv[2] if len(sys.argv) > 2 else "panels")  # fmt: skip
