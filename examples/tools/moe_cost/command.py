"""The command line of moe-cost."""

import argparse
import sys
from dataclasses import fields, replace

import moe

from . import bounds, cost, picture, published, report
from .clusters import CLUSTERS, Cluster
from .models import GRADIENT_BYTES, MODELS, Sizes, resolve

MOST_GPUS = 4096
CLUSTER_FIELDS = tuple(field.name for field in fields(Cluster) if field.name != "name")
MODEL_FIELDS = tuple(field.name for field in fields(Sizes) if field.name != "preset")


def whole(low, high):
    """A whole number in [low, high]."""

    def read(text):
        if text.isascii() and text.isdigit() and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from {low} to {high} is needed")

    return read


def real(low, high):
    """A number in [low, high]; low is so large that no time becomes infinite."""

    def read(text):
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if low <= number <= high:
            return number
        raise argparse.ArgumentTypeError(f"{text!r}: a number from {low:g} to {high:g} is needed")

    return read


def several(one):
    """Numbers with commas between them."""
    return lambda text: [one(part) for part in text.split(",")]


def widths(text):
    return None if text == "auto" else several(whole(1, MOST_GPUS))(text)


def add_model(parser):
    add = parser.add_argument_group(
        "model", "a name of --list, and numbers that differ"
    ).add_argument
    size = whole(1, 1 << 24)
    add("--model", metavar="NAME", help="default: mixtral")
    add("--d-model", type=size, metavar="D")
    add("--d-hidden", type=size, metavar="F", help="hidden width of an expert")
    add("--experts", type=whole(1, 1 << 17), metavar="E")
    add("--top-k", type=whole(1, 1 << 17), metavar="K")
    add("--activation", metavar="NAME", help="swiglu, gelu_erf, ...: the library's names")
    add("--shared", type=whole(0, 4096), metavar="N", help="shared experts")
    add("--shared-hidden", type=size, metavar="F", help="their hidden width (default: F)")
    add("--layers", type=whole(1, 10000), metavar="N", help="MoE layers of the model")
    add("--route-groups", type=whole(1, 1 << 17), metavar="A",
        help="groups of experts, of which a token chooses --route-top; 1: no limit")  # fmt: skip
    add("--route-top", type=whole(1, 1 << 17), metavar="G")
    add("--node-limit", type=whole(1, MOST_GPUS), metavar="M",
        help="a token goes to M nodes at most: each node's experts are a group")  # fmt: skip


def add_setup(parser):
    add = parser.add_argument_group("setup", "lists 8,16,64 give a line for each case").add_argument
    add("--gpus", type=several(whole(1, MOST_GPUS)), default=[64], metavar="N[,N]",
        help="default: 64")  # fmt: skip
    add("--gpus-per-node", type=whole(1, MOST_GPUS), default=8, metavar="N", help="default: 8")
    add("--ep", type=widths, metavar="P[,P]",
        help="expert-parallel width; default: the widest that fits")  # fmt: skip
    add("--ranks-per-node", type=whole(1, MOST_GPUS), metavar="L",
        help="of a group of P; default: as many as a node has")  # fmt: skip
    add("--tokens", type=several(whole(1, 1 << 24)), default=[4096], metavar="T[,T]",
        help="tokens of a GPU and micro-batch (default: 4096)")  # fmt: skip
    add("--dispatch-bytes", type=real(1 / 16, 8), default=2.0, metavar="B",
        help="of an element on its way to the expert (default: 2; fp8: 1)")  # fmt: skip
    add("--combine-bytes", type=real(1 / 16, 8), default=2.0, metavar="B",
        help="and back (default: 2)")  # fmt: skip
    add("--gradient-dtype", choices=sorted(GRADIENT_BYTES), default="float32",
        help="of sums of gradients (default: float32)")  # fmt: skip
    add("--accumulate", type=whole(1, 1 << 20), default=1, metavar="N",
        help="micro-batches of a step (default: 1)")  # fmt: skip
    add("--dedup", choices=("none", "rank", "node"), default="none",
        help="rows of a token: one for each expert, for each rank that it visits, or two stages: "
        "one for each node, passed on there to ranks (default: none)")  # fmt: skip
    add("--visits", choices=("mean", "most"), default="mean",
        help="nodes that a token visits with --dedup node: the mean of uniform routing, or as many "
        "as its groups allow, near the truth if scores choose groups (default: mean)")  # fmt: skip
    add("--chunks", type=whole(1, 1024), default=1, metavar="N",
        help="parts of a batch, of which one travels while another is worked on "
        "(default: 1, no overlap)")  # fmt: skip
    add("--overlap-shared", action="store_true", help="shared experts work while rows travel")
    add("--overlap-gradients", action="store_true", help="sums of gradients hide in the backward")
    add("--inference", action="store_true", help="the forward alone")


def add_cluster(parser):
    add = parser.add_argument_group(
        "cluster", "a name of --list, and numbers that differ"
    ).add_argument
    add("--cluster", choices=sorted(CLUSTERS), default="h100", help="default: h100")
    speed, micro = real(1e-3, 1e6), real(0, 1e6)
    add("--peak-tflops", type=speed, metavar="X", help="dense, of a GPU")
    add("--efficiency", type=real(1e-3, 1), metavar="X", help="what of it a GEMM reaches")
    add("--memory-gbs", type=speed, metavar="X", help="GB/s of a GPU's memory")
    add("--node-gbs", type=speed, metavar="X", help="GB/s of a GPU inside its node, one way")
    add("--network-gbs", type=speed, metavar="X", help="and to other nodes")
    add("--latency-us", type=micro, metavar="X", help="of an exchange")
    add("--message-us", type=micro, metavar="X", help="of each message of it")
    add("--launch-us", type=micro, metavar="X", help="the least time of a kernel")


def make_parser():
    parser = argparse.ArgumentParser(
        prog="moe-cost", usage="moe-cost [option]...", allow_abbrev=False,
        description="Models time and memory of a MoE layer on a cluster, and where communication "
        "bounds it. A model, not a measurement: docs/cost-model.md has the formulas.",
    )  # fmt: skip
    add_model(parser)
    add_setup(parser)
    add_cluster(parser)
    group = parser.add_argument_group("output", "one of these in place of a report or a table")
    add = group.add_mutually_exclusive_group().add_argument
    add("--csv", action="store_true", help="a row for each case; all options are columns")
    add("--plot", metavar="FILE", help="communication over GEMM time against the number of GPUs, "
        "of --model, or without it of mixtral and deepseek_v3; .svg or .png (needs "
        "matplotlib)")  # fmt: skip
    add("--published", action="store_true", help="all published figures, and the model's")
    add("--list", action="store_true", help="models and clusters by name")
    return parser


def chosen(names, options):
    """Those of the options that were given, by name."""
    values = {option: getattr(names, option) for option in options}
    return {option: value for option, value in values.items() if value is not None}


def read_model(names):
    name = names.model or "mixtral"
    known = MODELS.get(name)
    sizes = known or Sizes(name)
    given = chosen(names, MODEL_FIELDS)
    groups, top = names.route_groups, names.route_top
    if (groups is None) != (top is None):
        raise ValueError("--route-groups and --route-top go together")
    if groups is not None and names.node_limit is not None:
        raise ValueError("--node-limit does not go with --route-groups")
    if not known and name not in moe.presets():
        raise ValueError(f"--model {name}: not a model or a preset; --list has them")
    if given.get("activation", "relu").upper() not in moe.Activation.__members__:
        raise ValueError(
            f"--activation {names.activation}: it can be "
            + ", ".join(name.lower() for name in moe.Activation.__members__)
        )
    if names.node_limit is not None:
        groups = top = 1  # each setup has its own
    return resolve(name, replace(sizes, **given), groups, top)


def read_cluster(names):
    return replace(CLUSTERS[names.cluster], **chosen(names, CLUSTER_FIELDS))


def read_setup(names, model, gpus, ep, tokens):
    node = min(names.gpus_per_node, gpus)
    if gpus % node:
        raise ValueError(f"--gpus {gpus}: not a multiple of {node} a node")
    setup = cost.Setup(
        gpus, node, 1, 1, tokens, names.dispatch_bytes, names.combine_bytes,
        names.gradient_dtype, names.accumulate, names.dedup, names.visits, names.chunks,
        names.overlap_shared, names.overlap_gradients, not names.inference,
    )  # fmt: skip
    ep = bounds.widths(model, setup)[-1] if ep is None else ep
    ranks = min(node, ep) if names.ranks_per_node is None else names.ranks_per_node
    if ep > gpus or gpus % ep:
        raise ValueError(f"--ep {ep}: does not divide {gpus} GPUs")
    if model.experts % ep:
        raise ValueError(f"--ep {ep}: does not divide {model.experts} experts")
    if ranks > node or node % ranks or ep % ranks or ep // ranks > gpus // node:
        raise ValueError(
            f"--ranks-per-node {ranks}: {ep} ranks do not lie so on {gpus // node} nodes of {node}"
        )
    return replace(setup, ep=ep, ranks_per_node=ranks)


def limit_nodes(model, setup, most):
    if most is None:
        return model
    if most > setup.nodes:
        raise ValueError(
            f"--node-limit {most}: a group of {setup.ep} ranks has {setup.nodes} nodes"
        )
    if most * (model.experts // setup.nodes) < model.top_k:
        raise ValueError(
            f"--node-limit {most}: has fewer experts than the {model.top_k} of a token"
        )
    return cost.limited(model, setup, most)


def cases(names):
    model, cluster = read_model(names), read_cluster(names)
    found = []
    for gpus in names.gpus:
        for ep in names.ep or [None]:
            for tokens in names.tokens:
                setup = read_setup(names, model, gpus, ep, tokens)
                limited = limit_nodes(model, setup, names.node_limit)
                found.append(cost.cost(limited, cluster, setup))
    return found


def listing():
    lines = ["models with sizes"]
    for name, s in MODELS.items():
        shared = f", {s.shared} shared of {s.shared_hidden or s.d_hidden}" if s.shared else ""
        lines.append(
            f"  {name:<16} {s.preset:<12} D {s.d_model}, F {s.d_hidden}, E {s.experts}{shared}, "
            f"{s.layers} layers"
        )
    others = sorted(set(moe.presets()) - set(MODELS))
    lines += ["presets, whose --d-model, --d-hidden and --experts are to be given"]
    lines += ["  " + " ".join(others), "clusters"]
    for c in CLUSTERS.values():
        lines.append(
            f"  {c.name:<16} {c.peak_tflops:g} TFLOP/s x {c.efficiency:g}, memory "
            f"{c.memory_gbs:g}, node {c.node_gbs:g}, network {c.network_gbs:g} GB/s"
        )
    return "\n".join(lines) + "\n"


def read_plotted(parser, names):
    """The model to draw, or None. What would be ignored is refused: a picture has its own setups."""
    free = ("plot", "cluster", "model", "route_groups", "route_top")
    for option, value in vars(names).items():
        known = option in (*free, *CLUSTER_FIELDS, *MODEL_FIELDS)
        if not known and value != parser.get_default(option):
            raise ValueError(f"--{option.replace('_', '-')} does not go with --plot")
    if names.model:
        return read_model(names)
    given = chosen(names, (*MODEL_FIELDS, "route_groups"))
    if given:
        raise ValueError(f"--{min(given).replace('_', '-')} with --plot needs --model too")
    return None


def run(parser, names):
    if names.list:
        sys.stdout.write(listing())
    elif names.published:
        sys.stdout.write("\n".join(published.lines(published.FIGURES)) + "\n")
    elif names.plot is not None:
        picture.save(names.plot, read_cluster(names), read_plotted(parser, names))
    else:
        found = cases(names)
        if names.csv:
            report.write_csv(found, sys.stdout)
        else:
            sys.stdout.write(report.text(found[0]) if len(found) == 1 else report.table(found))


def main(arguments=None):
    """Returns 0; a wrong option leaves with status 2 and one line that names it."""
    parser = make_parser()
    names = parser.parse_args(arguments)
    try:
        run(parser, names)
    except (ValueError, moe.Error) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or 'output'}: {error.strerror or error}")
    except ImportError as error:
        sys.exit(f"moe-cost: {error}")  # no libmoe
    return 0
