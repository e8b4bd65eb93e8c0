"""examples/tools/moe_cost: its closed forms, found once more in other ways; published anchors."""

import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tools"))

from moe_cost import bounds, cost, kernels, models, picture, published, routing  # noqa: E402
from moe_cost.clusters import CLUSTERS  # noqa: E402

import moe  # noqa: E402

H100 = CLUSTERS["h100"]
EXACT = replace(H100, latency_us=0, message_us=0, launch_us=0)


def model(name, *groups):
    return models.resolve(name, models.MODELS[name], *(groups or (None, None)))


@pytest.fixture(scope="module")
def mixtral():
    return model("mixtral")


@pytest.fixture(scope="module")
def deepseek():
    return model("deepseek_v3")


@pytest.fixture(scope="module")
def free():
    """DeepSeek-V3 without its groups."""
    return model("deepseek_v3", 1, 1)


def placed(gpus, ep, tokens=4096, **fields):
    node = min(8, gpus)
    known = {"gpus_per_node": node, "ranks_per_node": min(node, ep), **fields}
    return cost.Setup(gpus=gpus, ep=ep, tokens=tokens, **known)


# ---- routing -------------------------------------------------------------------------------------


def drawn(generator, experts, top_k, groups, top_groups):
    size = experts // groups
    chosen = generator.sample(range(groups), top_groups)
    return generator.sample([g * size + i for g in chosen for i in range(size)], top_k)


def is_the_mean_of(expected, numbers):
    """Within 4.5 standard errors: one in 150,000 right ones is further away."""
    error = statistics.pstdev(numbers) / len(numbers) ** 0.5
    return abs(statistics.fmean(numbers) - expected) <= 4.5 * error + 1e-12


@pytest.mark.parametrize(
    "units, experts, top_k, groups, top_groups",
    [
        (8, 256, 8, 1, 1), (64, 256, 8, 1, 1), (2, 8, 2, 1, 1), (8, 256, 8, 8, 4),
        (32, 256, 8, 8, 4), (4, 256, 8, 8, 3), (2, 160, 6, 8, 3), (5, 60, 4, 3, 2),
        (1, 16, 4, 4, 1),
    ],
)  # fmt: skip
def test_visits_are_those_of_drawn_routings(units, experts, top_k, groups, top_groups):
    generator, size, kind = random.Random(7), experts // units, (experts, top_k, groups, top_groups)
    visits = [len({e // size for e in drawn(generator, *kind)}) for _ in range(5000)]
    assert is_the_mean_of(routing.expected_visits(units, *kind), visits)
    assert max(visits) <= routing.most_visits(units, *kind)


def test_visits_in_cases_that_are_known():
    assert routing.expected_visits(1, 64, 4) == 1
    assert routing.expected_visits(8, 8, 2) == pytest.approx(2, rel=1e-12)
    assert routing.expected_visits(256, 256, 8) == pytest.approx(8, rel=1e-12)
    assert routing.expected_visits(16, 16, 16) == 16
    assert routing.expected_visits(8, 256, 32, 8, 1) == pytest.approx(1, rel=1e-12)
    assert routing.most_visits(8, 256, 8, 8, 4) == 4  # a group a node
    assert routing.most_visits(32, 256, 8, 8, 4) == 8  # a group on four nodes, but K is 8
    assert routing.most_visits(2, 256, 8, 8, 4) == 2


def test_groups_chosen_by_score_are_near_the_most():
    """DeepSeek-V3's rule: the best 4 of 8 groups by the sum of their 2 best, then the best 8."""
    generator, total, draws = random.Random(3), 0, 1000
    for _ in range(draws):
        scores = [[generator.random() for _ in range(32)] for _ in range(8)]
        best = sorted(range(8), key=lambda g: -sum(sorted(scores[g])[-2:]))[:4]
        pairs = sorted(((s, g) for g in best for s in scores[g]), reverse=True)
        total += len({g for _, g in pairs[:8]})
    assert routing.expected_visits(8, 256, 8, 8, 4) == pytest.approx(3.629, abs=1e-3)
    assert total / draws == pytest.approx(3.95, abs=0.03)


@pytest.mark.parametrize("dedup", ["none", "rank", "node"])
@pytest.mark.parametrize("ep, ranks_per_node", [(8, 8), (16, 8), (16, 2), (64, 8), (32, 1)])
def test_copies_are_those_of_drawn_routings(deepseek, dedup, ep, ranks_per_node):
    s = placed(256, ep, ranks_per_node=ranks_per_node, dedup=dedup)
    kind = (deepseek.experts, deepseek.top_k, deepseek.groups, deepseek.top_groups)
    generator, network, node = random.Random(11), [], []
    for draw in range(32 * 64):
        here, local = draw % ep, ranks_per_node
        ranks = [e // (deepseek.experts // ep) for e in drawn(generator, *kind)]
        places = ranks if dedup == "none" else set(ranks)
        away = [r // local for r in places if r // local != here // local]
        if dedup == "node":
            # Over the network to the rank of the same place, then on to the others of the node.
            network.append(len(set(away)))
            node.append(sum(r % local != here % local for r in places))
        else:
            network.append(len(away))
            node.append(sum(r != here for r in places) - len(away))
    found = cost.copies(deepseek, s)
    assert is_the_mean_of(found.network, network) and is_the_mean_of(found.node, node)


# ---- what the library says -----------------------------------------------------------------------


def test_arithmetic_and_parameters_are_the_formulas(deepseek):
    d, f, e, k, t = 7168, 2048, 256, 8, 4096
    assert (deepseek.top_k, deepseek.groups, deepseek.top_groups) == (8, 8, 4)
    assert deepseek.flops(t) == (2 * t * d * e, 6 * t * k * d * f, 6 * t * d * f)
    everywhere, mine = deepseek.parameters(64)
    assert (mine.count, mine.bytes) == (4 * 3 * d * f, 2 * 4 * 3 * d * f)
    assert everywhere.count == d * e + e + 3 * d * f
    # Qwen2's shared expert has a gate of D numbers, which is the layer's.
    assert model("qwen2").parameters(60)[0].count == 2048 * 60 + 3 * 2048 * 5632 + 2048


def test_kernels_have_the_arithmetic_of_the_library(deepseek):
    t, combined = 4096, 2 * 4096 * 9 * 7168  # 8 routed and 1 shared: sums, and no GEMM
    whole = moe.flops(deepseek.gate, deepseek.pool, shared=deepseek.branch, tokens=t)
    forward = sum(k.flops for k in kernels.forward(deepseek, t, 64))
    backward = sum(k.flops for k in kernels.backward(deepseek, t, 64, 4))
    assert forward == whole.forward_flops - combined
    assert backward == whole.backward_flops - 2 * combined


def test_every_preset_with_sizes_is_a_model():
    for name, sizes in models.MODELS.items():
        made = model(name)
        assert made.top_k == (sizes.top_k or moe.preset(sizes.preset).gate.top_k)
        assert made.matrices == 3  # all are gated
        assert cost.cost(made, H100, placed(8, 4)).step > 0
    assert {sizes.preset for sizes in models.MODELS.values()} <= set(moe.presets())


def test_every_preset_takes_sizes_or_says_why_not():
    for name in moe.presets():
        sizes = models.Sizes(name, 64, 128, 16)
        if name == "hierarchical2017":
            with pytest.raises(ValueError, match="two levels"):
                models.resolve(name, sizes, None, None)
        else:
            made = models.resolve(name, sizes, None, None)
            assert made.matrices == 2 + (
                made.activation[-3:] == "glu" or "swiglu" in made.activation
            )
            assert cost.cost(made, H100, placed(16, 16)).forward.gemm > 0


# ---- anchors -------------------------------------------------------------------------------------


def test_break_even_widths(free):
    flat = placed(4096, 256)
    r = bounds.ratios(free, H100, flat)
    # As if every copy left: R counts those that stay on the node.
    assert r.network / (1 - 1 / 32) * free.d_hidden == pytest.approx(8060, rel=0.005)
    alone = placed(4096, 256, gpus_per_node=4096, ranks_per_node=256)
    r = bounds.ratios(free, H100, alone)
    assert r.node / (1 - 1 / 256) * free.d_hidden == pytest.approx(1075, rel=0.005)
    width = bounds.break_even_width(free, H100, flat)
    wide = replace(free, d_hidden=round(width))
    assert bounds.ratios(wide, H100, flat).slowest == pytest.approx(1, rel=1e-3)


def test_mixtral_in_a_node(mixtral):
    for gpus in (8, 64, 512, 4096):
        r = bounds.ratios(mixtral, H100, placed(gpus, 8))
        assert 0.06 <= r.slowest <= 0.08 and r.network == 0
    assert 70 <= bounds.compute_bound_tokens(mixtral, H100, placed(8, 8)) <= 120
    assert bounds.first_bound_width(mixtral, H100, placed(4096, 8)) is None


@pytest.mark.parametrize(
    "gpus, dedup, visits, dispatch, anchor",
    [(8, "rank", "mean", 2, 0.3), (64, "none", "mean", 2, 3.4), (64, "node", "mean", 2, 2.3),
     (64, "node", "most", 1, 1.3)],
)  # fmt: skip
def test_deepseek(free, deepseek, gpus, dedup, visits, dispatch, anchor):
    s = placed(gpus, gpus, dedup=dedup, visits=visits, dispatch_bytes=dispatch)
    one = free if visits == "mean" else cost.limited(deepseek, s, 4)
    assert bounds.ratios(one, H100, s).slowest == pytest.approx(anchor, abs=0.05)


def test_bytes_over_the_network_by_two_stages(free):
    for gpus, anchor in ((16, 4.0), (64, 1.5)):
        flat, staged = (cost.copies(free, placed(gpus, gpus, dedup=d)) for d in ("none", "node"))
        assert flat.network / staged.network == pytest.approx(anchor, abs=0.05)


FLOORS = {  # microseconds on an H100, T 4096, bf16
    "mixtral": {"gate logits": 10, "permute": 30, "activation": 210, "combine": 30, "dy gather": 30,
                "activation, row dot": 421, "dx combine": 30, "gate": 20},
    "deepseek_v3": {"gate logits": 21, "permute": 158, "activation": 120, "combine": 158,
                    "dy gather": 158, "activation, row dot": 240, "dx combine": 158, "gate": 40},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_byte_floors(name):
    one, cluster = model(name), replace(H100, efficiency=600 / 989)
    forward, backward = kernels.forward(one, 4096, 8), kernels.backward(one, 4096, 8, 4)
    found = {kernel.name: kernel for kernel in (*backward, *forward) if kernel.name != "GEMM"}
    for kernel, floor in FLOORS[name].items():
        assert found[kernel].times(cluster)[1] * 1e6 == pytest.approx(floor, rel=0.05), kernel
    assert found["scores, top-k"].times(cluster)[1] < 3e-6
    assert found["positions"].times(cluster)[1] < 1e-6
    for kernel in forward + backward:
        if kernel.name == "GEMM":
            micro = 4810 if kernel in forward else 9620
            assert kernel.times(cluster)[0] * 1e6 == pytest.approx(micro, rel=0.001)
    others = sum(k.times(cluster)[1] for k in forward + backward if k.name in FLOORS[name])
    assert 0.05 <= others / (4810e-6 + 9620e-6) <= 0.1


def test_launches_bound_few_tokens(mixtral):
    small = [k for k in kernels.forward(mixtral, 256, 8) if k.name != "GEMM"]
    large = [k for k in kernels.forward(mixtral, 4096, 8) if k.name != "GEMM"]
    share = [sum(k.times(H100)[2] for k in ks) / sum(k.times(H100)[1] for k in ks)
             for ks in (small, large)]  # fmt: skip
    assert share[0] > 1 > share[1]
    assert cost.cost(mixtral, H100, placed(8, 8, 16, training=False)).bound_by == "memory"
    assert cost.cost(mixtral, H100, placed(8, 8, 4096)).bound_by == "arithmetic"


def test_bytes_of_gemms_by_hand(deepseek):
    expert = 3 * 7168 * 2048
    gemm = {k.name: k for k in kernels.forward(deepseek, 1, 1)}
    row = (2 * 7168 + 3 * 2048) * 2
    assert gemm["GEMM"].bytes == pytest.approx(8 * (2 * expert + row))  # the 8 that have a row
    assert gemm["shared GEMM"].bytes == 2 * expert + row
    assert gemm["shared GEMM"].flops == 2 * expert
    back = {k.name: k for k in kernels.backward(deepseek, 1, 1, 4)}
    assert back["GEMM"].bytes == pytest.approx(8 * (6 * expert + 2 * row))
    assert back["shared GEMM"].bytes == 6 * expert + 2 * row
    generator, experts = random.Random(5), [set() for _ in range(400)]
    for touched in experts:
        for _ in range(24):
            touched.update(generator.sample(range(256), 8))
    share = kernels.touched_share(deepseek, 3, 8)
    assert is_the_mean_of(share, [len(touched) / 256 for touched in experts])


def test_memory_of_rows(deepseek):
    m = cost.memory(deepseek, placed(64, 64))
    assert m.rows == pytest.approx(1.34e9, rel=0.005)
    assert m.rows_worst == pytest.approx(42.9e9, rel=0.005)
    assert m.activations > m.rows  # the library's pass has them, and the router's


def test_published_figures():
    for ranks, dispatch, combine in ((64, 173, 314), (128, 192, 369), (256, 194, 360)):
        found = published.low_latency(ranks)
        assert found[0] == pytest.approx(dispatch, rel=0.15)
        assert found[1] == pytest.approx(combine, rel=0.15)
    assert published.mixtral_utilisation() == pytest.approx(0.493, abs=0.03)
    ratio = next(f for f in published.FIGURES if "DeepSeek-V3" in f.source).says()
    assert 0.8 <= float(ratio.split(":")[1]) <= 1.25


# ---- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dedup", ["none", "rank"])
@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_ratio_is_the_closed_form_without_latency(deepseek, gpus, dedup):
    s = placed(gpus, min(gpus, 256), tokens=1 << 20, dedup=dedup, training=False)
    assert cost.cost(deepseek, EXACT, s).ratio == pytest.approx(
        bounds.ratios(deepseek, EXACT, s).slowest, rel=1e-9
    )


def test_two_stages_add_up_or_overlap(deepseek):
    s = placed(64, 64, dedup="node", training=False)
    r = bounds.ratios(deepseek, EXACT, s)
    assert cost.cost(deepseek, EXACT, s).ratio == pytest.approx(r.network + r.node, rel=1e-9)
    many = cost.cost(deepseek, EXACT, replace(s, chunks=1000)).ratio
    assert r.slowest < many < 1.001 * r.slowest + 0.001


def test_the_backward_is_two_forwards_of_arithmetic(mixtral):
    c = cost.cost(mixtral, EXACT, placed(8, 8))
    assert c.backward.gemm == pytest.approx(2 * c.forward.gemm, rel=1e-9)
    assert c.backward.communication == c.forward.communication
    assert c.ratio == pytest.approx(c.forward.communication / c.forward.gemm * 2 / 3, rel=1e-9)


def test_an_exchange_by_hand(free):
    s = placed(16, 16, tokens=100)
    row = 100 * 7168 * 2
    found = cost.exchange(free, H100, s, 2)
    assert found == pytest.approx(5e-6 + max(4 * row / 45e9 + 8e-7, 3.5 * row / 337e9 + 7e-7))
    assert cost.exchange(free, H100, placed(8, 1), 2) == 0
    staged = replace(s, dedup="node")
    c = cost.copies(free, staged)
    by_hand = c.network * row / 45e9 + 1e-7 + c.node * row / 337e9 + 7e-7 + 2 * 5e-6
    assert cost.exchange(free, H100, staged, 2) == pytest.approx(by_hand)


def test_sums_of_gradients_by_hand(mixtral, deepseek):
    s = placed(64, 8)  # 8 replicas of each expert, one on each node
    everywhere, experts = cost.gradients(mixtral, EXACT, s)
    bytes_gate, bytes_expert = 4096 * 8 * 4, 3 * 4096 * 14336 * 4
    assert experts == pytest.approx(2 * bytes_expert * 7 / 8 / 45e9)
    ring = 2 * bytes_gate * 7 / 8 / 337e9 + 2 * bytes_gate / 8 * 7 / 8 / 45e9
    assert everywhere == pytest.approx(ring)
    beside = replace(placed(64, 8), ranks_per_node=1)  # all replicas in a node
    assert cost.gradients(mixtral, EXACT, beside)[1] == pytest.approx(
        2 * bytes_expert * 7 / 8 / 337e9
    )
    assert cost.gradients(deepseek, H100, placed(64, 64))[1] == 0
    # 2 x 7 messages of a ring, and 2 x 3 of a tree over 8 nodes.
    assert cost.gradients(mixtral, H100, s)[0] == pytest.approx(ring + 5e-6 + 20 * 1e-7)
    half = cost.gradients(mixtral, EXACT, replace(s, gradient_dtype="bfloat16"))
    assert half == pytest.approx((everywhere / 2, experts / 2))


def test_what_overlaps(deepseek):
    s = placed(64, 64, training=False)
    plain = cost.cost(deepseek, H100, s).forward
    shared = cost.cost(deepseek, H100, replace(s, overlap_shared=True)).forward
    assert plain.hidden == 0
    assert shared.hidden == pytest.approx(plain.of("shared GEMM", "shared activation"))
    assert shared.total == pytest.approx(plain.total - shared.hidden)
    chunks = cost.cost(deepseek, EXACT, replace(s, chunks=4)).forward
    work = chunks.of("GEMM", "activation")
    assert chunks.hidden == pytest.approx(0.75 * min(work, chunks.communication))
    trained = cost.cost(deepseek, H100, placed(64, 64, overlap_gradients=True))
    assert trained.gradients == max(
        0, trained.everywhere + trained.experts - trained.backward.total
    )


def test_a_step_adds_micro_batches(mixtral):
    one = cost.cost(mixtral, H100, placed(64, 8))
    four = cost.cost(mixtral, H100, placed(64, 8, accumulate=4))
    sums = one.everywhere + one.experts
    assert four.step - sums == pytest.approx(4 * (one.step - sums))
    assert one.utilisation < four.utilisation < H100.efficiency
    # 64 GPUs with 8 replicas: sums of f32 gradients take most of a step of one micro-batch.
    many = cost.cost(mixtral, H100, placed(64, 8, accumulate=64))
    assert (one.bound_by, many.bound_by) == ("gradients", "arithmetic")
    for c in (one, four, many):
        assert sum(c.limits().values()) == pytest.approx(c.step)


def test_more_of_anything_that_costs_takes_longer(deepseek, free):
    base = placed(64, 64)
    step = cost.cost(deepseek, H100, base).step
    for slower in ("efficiency", "memory_gbs", "network_gbs", "peak_tflops"):
        worse = replace(H100, **{slower: getattr(H100, slower) / 2})
        assert cost.cost(deepseek, worse, base).step > step, slower
    for more in ("latency_us", "message_us"):
        worse = replace(H100, **{more: 10 * getattr(H100, more)})
        assert cost.cost(deepseek, worse, base).step > step, more
    for field, value in (("tokens", 8192), ("dispatch_bytes", 4), ("combine_bytes", 4)):
        assert cost.cost(deepseek, H100, replace(base, **{field: value})).step > step, field
    widths = [bounds.ratios(free, H100, placed(g, min(g, 256))).slowest for g in picture.GPUS]
    assert widths == sorted(widths) and widths[-1] == widths[-2]
    dedup = [cost.copies(free, replace(base, dedup=d)).network for d in ("none", "rank", "node")]
    assert dedup == sorted(dedup, reverse=True)
    limits = [cost.copies(cost.limited(free, base, n), replace(base, dedup="node")).network
              for n in range(1, 9)]  # fmt: skip
    assert limits == sorted(limits)
    assert limits[-1] == pytest.approx(cost.copies(free, replace(base, dedup="node")).network)


def test_it_turns_communication_bound_where_it_says(free):
    s = placed(64, 64)
    first = bounds.first_bound_width(free, H100, s)
    assert first == 16
    assert bounds.ratios(free, H100, placed(64, 8)).slowest < 1
    assert bounds.ratios(free, H100, placed(64, 16)).slowest > 1
    gbs = bounds.break_even_gbs(free, H100, s)
    faster = replace(H100, network_gbs=gbs)
    assert bounds.ratios(free, faster, s).network == pytest.approx(1)
    tokens = bounds.compute_bound_tokens(free, H100, s)
    below, above = (kernels.forward(free, round(tokens * x), 64)[4] for x in (0.9, 1.1))
    assert (below.limit(H100), above.limit(H100)) == ("memory", "arithmetic")


def test_the_picture_has_the_anchors(deepseek):
    curves = {label: values for label, _, _, values in picture.model_curves(deepseek, H100)}
    at = picture.GPUS.index(64)
    assert curves["nodes of 8, each copy alone"][at] == pytest.approx(3.44, abs=0.01)
    assert curves["nodes of 8, once to each node"][at] == pytest.approx(2.28, abs=0.01)
    assert curves["the same, to 4 nodes, fp8 dispatch"][at] == pytest.approx(1.29, abs=0.01)
    assert curves["all NVLink, once to each GPU"][0] == pytest.approx(0.30, abs=0.01)
    near, far = (values for _, _, _, values in picture.mixtral_curves(H100))
    assert near == pytest.approx([0.0657] * 10, abs=1e-3)
    assert far[0] == near[0] and far[3:] == pytest.approx([0.492] * 7, abs=1e-3)


def test_a_picture_of_each_model_is_the_ratios_of_its_widest_groups():
    for name in models.MODELS:
        one = model(name)
        curves = picture.model_curves(one, H100)
        assert [len(values) for *_, values in curves] == [len(picture.GPUS)] * 5
        for gpus, r in zip(picture.GPUS, curves[0][3]):
            widest = max(p for p in range(1, gpus + 1)
                         if one.experts % p == gpus % p == 0 and (8 % p == 0 or p % 8 == 0))  # fmt: skip
            assert r == bounds.ratios(one, H100, placed(gpus, widest)).slowest, (name, gpus)
        # Each remedy is one: no row travels more often, or with more bytes.
        flat, node, limited, near, near_dedup = (values for *_, values in curves)
        for worse, better in ((flat, node), (node, limited), (near, near_dedup)):
            assert all(a >= b - 1e-12 for a, b in zip(worse, better)), name


def test_the_picture_shows_whatever_the_cluster_gives(deepseek):
    for network, node in ((45, 337), (0.001, 0.001), (1e6, 1e6), (1e6, 0.001)):
        cluster = replace(H100, network_gbs=network, node_gbs=node)
        curves = picture.mixtral_curves(cluster) + picture.model_curves(deepseek, cluster)
        low, high, ticks = picture.heights(curves)
        assert all(low < value < high for _, _, _, values in curves for value in values)
        assert low < 1 < high and 1 in ticks and 3 <= len(ticks) <= 16
        assert ticks == sorted(set(ticks)) and low <= ticks[0] and ticks[-1] <= high
