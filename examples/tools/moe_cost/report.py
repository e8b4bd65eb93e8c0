"""A cost as text, several as a table, and as CSV whose first columns are the command's options."""

import csv
from dataclasses import fields

from . import bounds, published

US = 1e6


def _size(count):
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _heading(c):
    m, s, k = c.model, c.setup, c.cluster
    shared = f", {m.shared} shared of {m.shared_hidden}" if m.shared else ""
    limit = f", from {m.top_groups} of {m.groups} groups" if m.groups > m.top_groups else ""
    nodes = "1 node" if s.nodes == 1 else f"{s.nodes} nodes, {s.ranks_per_node} ranks each"
    return [
        f"model    {m.name}: D {m.d_model}, F {m.d_hidden}, E {m.experts}, K {m.top_k}{limit}; "
        f"{m.activation}{shared}; {m.layers} MoE layers",
        f"cluster  {k.name}: {s.gpus} GPUs, {s.gpus_per_node} a node; {k.peak_tflops:g} TFLOP/s "
        f"x {k.efficiency:g}; memory {k.memory_gbs:g}, node {k.node_gbs:g}, network "
        f"{k.network_gbs:g} GB/s",
        f"setup    expert-parallel {s.ep} on {nodes}; {s.tokens} tokens a GPU; dispatch "
        f"{s.dispatch_bytes:g}, combine {s.combine_bytes:g} bytes an element; dedup {s.dedup}, "
        f"chunks {s.chunks}",
    ]


def _parts(one):
    """Rows of the table of times: name, seconds."""
    names = ("GEMM", "activation", "activation, row dot", "shared GEMM", "shared activation")
    rest = one.computing - one.of(*names)
    return [
        ("dispatch", one.dispatch),
        ("GEMM of routed experts", one.gemm),
        ("activation", one.of("activation", "activation, row dot")),
        ("combine", one.combine),
        ("shared experts", one.of("shared GEMM", "shared activation")),
        ("router, permute, sums", rest),
        ("hidden by overlap", -one.hidden),
        ("total", one.total),
    ]


def _times(c):
    heads = ("forward", "backward")[: len(c.passes)]
    lines = ["microseconds a layer      " + "".join(f"{head:>12}" for head in heads)]
    for rows in zip(*(_parts(one) for one in c.passes)):
        if not any(seconds for _, seconds in rows):
            continue
        cells = "".join(f"{seconds * US:12.1f}" for _, seconds in rows)
        lines.append(f"  {rows[0][0]:<24}{cells}")
    if not c.backward:
        return lines
    lines += [
        f"  gradients of gate, shared {c.everywhere * US:10.1f}",
        f"  gradients of replicas     {c.experts * US:10.1f}",
    ]
    return lines + [
        f"training step, {c.setup.accumulate} of {c.setup.tokens} tokens a GPU: "
        f"{c.step * US:.1f} us a layer, "
        f"{c.step * c.model.layers * 1e3:.2f} ms in {c.model.layers}; "
        f"{100 * c.utilisation:.0f} % of the peak"
    ]


def _bounds(c):
    m, k, s = c.model, c.cluster, c.setup
    r = bounds.ratios(m, k, s)
    tokens = bounds.compute_bound_tokens(m, k, s)
    width = bounds.first_bound_width(m, k, s)
    spent = c.limits()
    total = sum(spent.values())
    shares = ", ".join(f"{name} {100 * t / total:.0f} %" for name, t in spent.items())
    most = f" (at most {r.at_most:.2f})" if r.at_most > r.network else ""
    lines = [
        f"communication / GEMM      {c.ratio:.3f} of all passes, "
        f"{c.forward.communication / c.forward.gemm:.3f} of the forward",
        f"R, many tokens            network {r.network:.3f}{most}, node {r.node:.3f}",
        f"time goes to              {shares}",
        f"bound by                  {c.bound_by}",
        "communication-bound       "
        + ("at no width of expert parallelism" if width is None else f"from width {width} on")
        + f"; experts narrower than F {bounds.break_even_width(m, k, s):.0f}",
    ]
    if r.network:
        lines[-1] += f"; network below {bounds.break_even_gbs(m, k, s):.1f} GB/s"
    lines.append(
        "GEMM waits for weights    "
        + ("always: rows are too narrow" if tokens is None else f"below {tokens:.0f} tokens a GPU")
    )
    return lines


def _memory(c):
    m = c.memory
    return [
        f"memory a rank and layer   parameters {_size(m.parameters)}, gradients "
        f"{_size(m.gradients)}, pass {_size(m.activations)}",
        f"rows that come            {_size(m.rows)} balanced, {_size(m.rows_worst)} at worst",
    ]


def text(c):
    blocks = [_heading(c), _times(c), _bounds(c), _memory(c)]
    figures = published.of_model(c.model.name)
    if figures:
        blocks.append(
            ["published figures, and the model's in their cases", *published.lines(figures)]
        )
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


# ---- rows ----------------------------------------------------------------------------------------


def inputs(c):
    """The command's options of this case by name, without --model and --cluster."""
    m, s = c.model, c.setup
    known = {
        "d_model": m.d_model, "d_hidden": m.d_hidden, "experts": m.experts, "top_k": m.top_k,
        "activation": m.activation, "layers": m.layers, "shared": m.shared,
        "shared_hidden": m.shared_hidden, "route_groups": m.groups, "route_top": m.top_groups,
    }  # fmt: skip
    known.update({f.name: getattr(s, f.name) for f in fields(s) if f.name != "training"})
    known["inference"] = not s.training
    known.update(
        {f.name: getattr(c.cluster, f.name) for f in fields(c.cluster) if f.name != "name"}
    )
    return {name: int(value) if isinstance(value, bool) else value for name, value in known.items()}


def outputs(c):
    """What was found, in microseconds, bytes and ratios."""
    r = bounds.ratios(c.model, c.cluster, c.setup)
    found = {}
    for name, one in (("forward", c.forward), ("backward", c.backward)):
        found[f"{name}_us"] = one.total * US if one else 0.0
        found[f"{name}_gemm_us"] = one.gemm * US if one else 0.0
        found[f"{name}_dispatch_us"] = one.dispatch * US if one else 0.0
        found[f"{name}_combine_us"] = one.combine * US if one else 0.0
        found[f"{name}_hidden_us"] = one.hidden * US if one else 0.0
    tokens = bounds.compute_bound_tokens(c.model, c.cluster, c.setup)
    found.update({
        "gradients_us": (c.everywhere + c.experts) * US,
        "step_us": c.step * US,
        "ratio": c.ratio,
        "r_network": r.network,
        "r_node": r.node,
        "r_network_at_most": r.at_most,
        "break_even_width": bounds.break_even_width(c.model, c.cluster, c.setup),
        "compute_bound_tokens": "" if tokens is None else tokens,
        "bound_by": c.bound_by,
        "utilisation": c.utilisation,
        "parameter_bytes": c.memory.parameters,
        "gradient_bytes": c.memory.gradients,
        "pass_bytes": c.memory.activations,
        "rows_bytes": c.memory.rows,
        "rows_worst_bytes": c.memory.rows_worst,
    })  # fmt: skip
    return found


def write_csv(costs, file):
    rows = [
        {"model": c.model.name, "cluster": c.cluster.name, **inputs(c), **outputs(c)} for c in costs
    ]
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def table(costs):
    """One line a case."""
    heads = ("GPUs", "EP", "tokens", "forward us", "step us", "GEMM us", "comm us", "hidden us",
             "gradients us", "comm/GEMM", "R", "bound by")  # fmt: skip
    lines = ["".join(f"{head:>13}" for head in heads)]
    for c in costs:
        s = c.setup
        cells = [s.gpus, s.ep, s.tokens, c.forward.total * US, c.step * US]
        cells += [
            sum(getattr(p, n) for p in c.passes) * US for n in ("gemm", "communication", "hidden")
        ]
        cells.append((c.everywhere + c.experts) * US)
        shown = [f"{v:13d}" if isinstance(v, int) else f"{v:13.1f}" for v in cells]
        slowest = bounds.ratios(c.model, c.cluster, s).slowest
        lines.append("".join(shown) + f"{c.ratio:13.3f}{slowest:13.3f}{c.bound_by:>15}")
    return "\n".join(lines) + "\n"
