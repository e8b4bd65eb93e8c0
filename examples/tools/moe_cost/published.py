"""Figures that others published, and what the model says of the same case.

docs/cost-model.md has their sources. Where the model can say nothing, `says` is None and `note` has
the reason.
"""

from dataclasses import dataclass
from typing import Callable, Optional

from . import cost
from .clusters import CLUSTERS
from .models import MODELS, resolve

LOW_LATENCY = "DeepEP docs/legacy.md, low latency"
NORMAL = "DeepEP docs/legacy.md, normal"
FP8 = 1 + 4 / 128  # bytes an element: one, and an f32 scale for every 128


@dataclass(frozen=True)
class Figure:
    models: tuple
    source: str
    what: str
    published: str
    says: Optional[Callable[[], str]]
    note: str


def _model(name):
    return resolve(name, MODELS[name], None, None)


def _deepseek_ratio():
    setup = cost.Setup(
        2048, 8, 64, 8, 4096, dispatch_bytes=FP8, dedup="node", visits="most", chunks=8
    )
    return f"1:{cost.cost(_model('deepseek_v3'), CLUSTERS['h800'], setup).ratio:.1f}"


def low_latency(ranks):
    """Microseconds of dispatch and combine of 128 tokens on H800s."""
    setup = cost.Setup(ranks, 8, ranks, 8, 128, FP8, 2, training=False)
    forward = cost.pass_cost(_model("deepseek_v3"), CLUSTERS["h800"], setup)
    return forward.dispatch * 1e6, forward.combine * 1e6


def _low_latency(ranks):
    return lambda: "{:.0f} / {:.0f} us".format(*low_latency(ranks))


def mixtral_utilisation():
    setup = cost.Setup(128, 8, 8, 8, 4096, accumulate=64)
    return cost.cost(_model("mixtral_8x22b"), CLUSTERS["h100"], setup).utilisation


def _link(name):
    return lambda: f"{getattr(CLUSTERS['h800'], name):g} GB/s"


FIGURES = (
    Figure(
        ("deepseek_v3",), "DeepSeek-V3, arXiv 2412.19437",
        "computation to communication, EP64 on 8 nodes",
        "about 1:1", _deepseek_ratio,
        "the report's has attention, and GEMMs in fp8; the model's is the experts' in bf16",
    ),
    *(
        Figure(
            ("deepseek_v3",), LOW_LATENCY, f"dispatch / combine of 128 tokens, EP{p}",
            published, _low_latency(p), note,
        )
        for p, published, note in (
            (8, "77 / 114 us", "pure RDMA there; here the node's links"),
            (16, "118 / 195 us", "here half the rows stay in the node"),
            (32, "155 / 273 us", "a quarter stays"),
            (64, "173 / 314 us", ""),
            (128, "192 / 369 us", ""),
            (256, "194 / 360 us", "latency_us and message_us are chosen by these"),
        )
    ),
    Figure(
        ("deepseek_v3",), NORMAL, "dispatch / combine inside a node, EP8",
        "153 / 158 GB/s", _link("node_gbs"), "an input: node_gbs of h800",
    ),
    *(
        Figure(
            ("deepseek_v3",), NORMAL, f"dispatch / combine over RDMA, EP{p}",
            published, _link("network_gbs"), note,
        )
        for p, published, note in (
            (16, "43 / 43 GB/s", "an input: network_gbs, 90 % of the link"),
            (32, "58 / 57 GB/s", "above the link's 50, so not all of it crossed the link"),
            (64, "51 / 50 GB/s", ""),
        )
    ),
    Figure(
        ("mixtral_8x22b",), "Megatron-Core, arXiv 2504.14960",
        "share of an H100's peak in training",
        "49.3 %", lambda: f"{100 * mixtral_utilisation():.0f} %",
        "the whole model there, its MoE layers here, with 64 micro-batches a step",
    ),
    Figure(
        (), "Tutel, arXiv 2206.03382",
        "a layer against Fairseq's, 16 and 2048 A100", "4.96x, 5.75x", None,
        "compares programs: the other one's dense dispatch is not in the model",
    ),
    Figure(
        (), "DeepSpeed-MoE, arXiv 2201.05596",
        "latency of inference against earlier systems", "7.3x", None,
        "compares programs, over whole models",
    ),
    Figure(
        (), "Shazeer et al., arXiv 1701.06538",
        "TFLOP/s of a K40 (peak 4.29)", "0.74 to 1.56", None,
        "whole models, and clusters whose links are not published",
    ),
)  # fmt: skip


def of_model(name):
    return [figure for figure in FIGURES if name in figure.models]


def lines(figures):
    """A table of figures as text."""
    rows = [("source", "what", "published", "model", "note")]
    for f in figures:
        rows.append((f.source, f.what, f.published, f.says() if f.says else "-", f.note))
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, wide)), row[4]]).rstrip() for row in rows
    ]
