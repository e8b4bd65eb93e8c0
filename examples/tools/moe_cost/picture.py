"""R of the forward against the number of GPUs, of Mixtral and DeepSeek-V3 or of a model of one's own.

Needs matplotlib.
"""

from dataclasses import replace
from math import ceil, floor, log10

from . import bounds, cost
from .models import MODELS, resolve

GPUS = tuple(8 << i for i in range(10))  # 8 to 4096
NODE = 8
NVLINK, NETWORK, LIMITED = "#2a7f62", "#b03a2e", "#1f5a99"


def _model(name):
    return resolve(name, MODELS[name], None, None)


def mixtral_curves(cluster):
    """(label, colour, style, values): one expert a rank, in a node or over nodes."""
    model = _model("mixtral")
    near, far = [], []
    for gpus in GPUS:
        setup = cost.Setup(gpus, NODE, 8, 8, 4096)
        near.append(bounds.ratios(model, cluster, setup).slowest)
        spread = replace(setup, ranks_per_node=max(1, 8 * NODE // gpus))
        far.append(bounds.ratios(model, cluster, spread).slowest)
    return [
        ("8 ranks in one node (NVLink)", NVLINK, "-", near),
        ("8 ranks spread over nodes (InfiniBand);\nwith one expert a rank, dedup changes nothing",
         NETWORK, "-", far),
    ]  # fmt: skip


def _widest(model, gpus, node):
    return bounds.widths(model, cost.Setup(gpus, node, 1, 1, 4096))[-1]


def _most_nodes(model, setup):
    """The model with a token on as many nodes as it may choose groups, or as its experts need."""
    needed = ceil(model.top_k * setup.nodes / model.experts)
    return cost.limited(model, setup, min(setup.nodes, max(model.top_groups, needed)))


def model_curves(model, cluster):
    """The widest expert parallelism that fits, up to an expert a rank."""
    free = replace(model, groups=1, top_groups=1)
    curves = {name: [] for name in ("flat", "node", "limited", "near", "near_dedup")}
    for gpus in GPUS:
        p, q = _widest(model, gpus, gpus), _widest(model, gpus, NODE)
        whole = cost.Setup(gpus, gpus, p, p, 4096)  # as if all GPUs were one node
        nodes = cost.Setup(gpus, NODE, q, min(q, NODE), 4096)
        cases = {
            "flat": (free, nodes),
            "node": (free, replace(nodes, dedup="node")),
            "limited": (
                _most_nodes(model, nodes),
                replace(nodes, dedup="node", dispatch_bytes=1, visits="most"),
            ),
            "near": (free, whole),
            "near_dedup": (free, replace(whole, dedup="rank")),
        }
        for name, (one, setup) in cases.items():
            curves[name].append(bounds.ratios(one, cluster, setup).slowest)
    limit = f"to {model.top_groups} nodes, " if model.top_groups < model.groups else ""
    labels = {
        "flat": ("nodes of 8, each copy alone", NETWORK, "-"),
        "node": ("nodes of 8, once to each node", NETWORK, "--"),
        "limited": (f"the same, {limit}fp8 dispatch", LIMITED, "--"),
        "near": ("all NVLink, each copy alone", NVLINK, "-"),
        "near_dedup": ("all NVLink, once to each GPU", NVLINK, "--"),
    }
    return [(*labels[name], values) for name, values in curves.items()]


def heights(curves):
    """Limits and ticks of the axis of R that show all curves, and at least 0.05 to 5."""
    values = [value for _, _, _, one in curves for value in one]
    low, high = 0.8 * min(0.05, *values), 1.6 * max(5, *values)
    decades = range(floor(log10(low)), ceil(log10(high)))
    steps = (1, 2, 5) if len(decades) < 5 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return low, high, [tick for tick in ticks if low <= tick <= high]


def _draw(axes, title, curves, labelled=()):
    for label, gpus, above in labelled:
        values = next(values for name, _, _, values in curves if name == label)
        value = values[GPUS.index(gpus)]
        axes.annotate(f"{value:.2g}", (gpus, value), textcoords="offset points", fontsize=8,
                      xytext=(0, 6 if above else -13), ha="center")  # fmt: skip
    for label, colour, style, values in curves:
        axes.plot(GPUS, values, style, color=colour, linewidth=1.8, marker="o", markersize=3.5,
                  label=label)  # fmt: skip
    axes.axhline(1, color="#222222", linewidth=1)
    axes.annotate("above R = 1: communication-bound", (GPUS[-1], 1), textcoords="offset points",
                  xytext=(0, -4), ha="right", va="top", fontsize=8)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.minorticks_off()
    axes.set_xlabel("GPUs")
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, handlelength=2.4, columnspacing=1, fontsize=8, loc="upper left",
                ncols=1 + (len(curves) > 3), bbox_to_anchor=(0, -0.11))  # fmt: skip


def _panels(cluster, model):
    """(title, curves, labels of numbers) of each."""
    flat, near = "nodes of 8, each copy alone", "all NVLink, each copy alone"
    if model:
        title = f"{model.name}: D {model.d_model}, F {model.d_hidden}, E {model.experts}, K "
        title += f"{model.top_k}; as many ranks a group as fit"
        return [(title, model_curves(model, cluster), [(flat, 64, True), (near, 64, True)])]
    mixtral = mixtral_curves(cluster)
    deepseek = model_curves(_model("deepseek_v3"), cluster)
    numbers = [(flat, 64, True), ("nodes of 8, once to each node", 64, True),
               ("the same, to 4 nodes, fp8 dispatch", 64, True), (near, 64, False)]  # fmt: skip
    return [
        ("Mixtral 8x7B: 8 ranks a group", mixtral, [("8 ranks in one node (NVLink)", 64, True)]),
        ("DeepSeek-V3: min(GPUs, 256) ranks a group", deepseek, numbers),
    ]


def save(path, cluster, model=None):
    """Writes a picture, .svg or .png; the same bytes for the same matplotlib."""
    if not str(path).endswith((".svg", ".png")):
        raise ValueError(f"--plot {path}: a name that ends in .svg or .png is needed")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib: {error}") from error

    panels = _panels(cluster, model)
    low, high, ticks = heights([curve for _, curves, _ in panels for curve in curves])
    with plt.rc_context({"svg.hashsalt": "moe-cost", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(1, len(panels), figsize=(10.4 if len(panels) > 1 else 7, 5.4),
                                    sharey=True, squeeze=False)  # fmt: skip
        for one, panel in zip(axes[0], panels):
            _draw(one, *panel)
        axes[0][0].set_ylim(low, high)
        axes[0][0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[0][0].set_ylabel("R: communication over GEMM time, forward")
        figure.suptitle(
            f"{cluster.name}: {cluster.peak_tflops:g} TFLOP/s x {cluster.efficiency:g}, "
            f"{cluster.node_gbs:g} GB/s in a node, {cluster.network_gbs:g} GB/s between nodes; "
            "a model, not a measurement", fontsize=9, color="#555555",
        )  # fmt: skip
        figure.tight_layout()
        metadata = {"Date": None} if str(path).endswith(".svg") else None
        figure.savefig(path, dpi=110, metadata=metadata)
        plt.close(figure)
