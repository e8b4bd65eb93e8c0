#!/usr/bin/env python3
"""Draws the CSV log of the demo: bits per byte of both models, and how the load is balanced.

    build/demo --log run.csv
    python3 examples/tools/plot_demo.py run.csv run.png

Needs matplotlib 3.6 or newer.
"""
import argparse
import csv
import math
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODELS = (("moe", "MoE", "#c0392b"), ("dense", "dense twin", "#2c5f8a"))
NEEDED = ["step", "moe_seconds", "dense_seconds", "moe_train_bits", "moe_held_bits",
          "dense_train_bits", "dense_held_bits", "balance_loss", "busiest_over_mean",
          "idle_experts"]


def read_log(path):
    """The columns of a log as lists of numbers; the empty cells of a model not trained are NaN."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        sys.exit(f"{path}: {error}")
    if not rows:
        sys.exit(f"{path}: no rows")
    missing = [name for name in NEEDED if name not in rows[0]]
    if missing:
        sys.exit(f"{path}: not a log of the demo: no column {missing[0]}")
    try:
        return {name: [float(row[name] or "nan") for row in rows] for name in NEEDED}
    except (TypeError, ValueError) as error:
        sys.exit(f"{path}: not a log of the demo: {error}")


def trained(log, model):
    return not all(math.isnan(value) for value in log[f"{model}_held_bits"])


def draw_bits(axes, log, over, label):
    """Bits over the column `over`, in which {} stands for the model."""
    low, high = math.inf, 0
    for model, name, colour in MODELS:
        if not trained(log, model):
            continue
        held, train = log[f"{model}_held_bits"], log[f"{model}_train_bits"]
        x = log[over.format(model)]
        axes.plot(x, train, color=colour, alpha=0.35, linewidth=1, label=f"{name}, training")
        axes.plot(x, held, color=colour, linewidth=1.8, label=f"{name}, held out: {held[-1]:.3f}")
        low = min(low, min(held), min(train))
        # The first steps are far above everything that is interesting.
        high = max(high, held[len(held) // 20])
    axes.set_ylim(low - 0.1, max(high, low + 0.2) + 0.1)
    axes.set_xlabel(label)
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def draw_balance(axes, log):
    axes.plot(log["step"], log["busiest_over_mean"], color="#c0392b", linewidth=1.8,
              label="busiest expert / mean (1 is even)")
    axes.plot(log["step"], log["idle_experts"], color="#7f8c8d", linewidth=1.2,
              label="experts below a quarter of the mean")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("load of the experts")
    axes.grid(alpha=0.25)
    right = axes.twinx()
    right.plot(log["step"], log["balance_loss"], color="#d68910", linewidth=1, alpha=0.8)
    right.set_ylim(bottom=0)
    right.set_ylabel("balance loss, weighted", color="#d68910")
    right.tick_params(axis="y", colors="#d68910")
    axes.legend(frameon=False, fontsize=9)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", help="log written by demo --log")
    parser.add_argument("png", help="picture to write")
    names = parser.parse_args()
    log = read_log(names.csv)
    if not trained(log, "moe") and not trained(log, "dense"):
        sys.exit(f"{names.csv}: no bits of any model")
    panels = 3 if trained(log, "moe") else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.4))
    draw_bits(axes[0], log, "step", "steps")
    draw_bits(axes[1], log, "{}_seconds", "seconds in its own training steps")
    if panels == 3:
        draw_balance(axes[2], log)
    titles = {
        (True, True): "The MoE language model and its dense twin of equal multiply-adds per byte",
        (True, False): "The MoE language model",
        (False, True): "The dense language model",
    }
    figure.suptitle(titles[trained(log, "moe"), trained(log, "dense")])
    figure.tight_layout()
    try:
        figure.savefig(names.png, dpi=110)
    except (OSError, ValueError) as error:
        sys.exit(f"{names.png}: {error}")


if __name__ == "__main__":
    main()
