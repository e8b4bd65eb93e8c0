"""How many units (nodes, or ranks) a token visits when routing is uniform.

E experts lie in order on equal units, and in order in A equal groups. A token chooses g groups,
each set of g alike, then K experts of these g E / A, each set of K alike. Without groups A = g = 1.
With c of the candidates on a unit, all K miss it with probability C(gE/A - c, K) / C(gE/A, K); c
depends on how many of the groups that the unit overlaps are chosen. Everything is counted in
whole numbers, and divided once.
"""

from functools import lru_cache
from math import comb


def overlaps(first, size, group_size):
    """How many experts the range [first, first + size) has of each group that it meets."""
    counts = []
    while size > 0:
        count = min(size, group_size - first % group_size)
        counts.append(count)
        first, size = first + count, size - count
    return counts


def visit_probability(counts, experts, top_k, groups=1, top_groups=1):
    """That a token has an expert on a unit which has counts[i] experts of its i-th group."""
    candidates = top_groups * (experts // groups)
    ways = {(0, 0): 1}  # of choosing so many of the unit's groups, with so many of its experts
    for count in counts:
        chosen = {}
        for (number, inside), n in ways.items():
            for take in (0, 1):
                state = (number + take, inside + take * count)
                chosen[state] = chosen.get(state, 0) + n
        ways = chosen
    missed = 0
    for (number, inside), n in ways.items():
        if number <= top_groups:
            elsewhere = comb(groups - len(counts), top_groups - number)
            missed += n * elsewhere * comb(candidates - inside, top_k)
    return 1 - missed / (comb(groups, top_groups) * comb(candidates, top_k))


@lru_cache(maxsize=None)
def expected_visits(units, experts, top_k, groups=1, top_groups=1):
    """The mean number of different units that a token visits."""
    size = experts // units
    kinds = {}  # units that overlap groups alike are alike
    for unit in range(units):
        counts = tuple(overlaps(unit * size, size, experts // groups))
        kinds[counts] = kinds.get(counts, 0) + 1
    return sum(
        n * visit_probability(counts, experts, top_k, groups, top_groups)
        for counts, n in kinds.items()
    )


def most_visits(units, experts, top_k, groups=1, top_groups=1):
    """The most units that any choice can visit."""
    group_size, size = experts // groups, experts // units
    spans = -(-group_size // size) if group_size % size == 0 or size % group_size == 0 else units
    return min(units, top_k, top_groups * spans)
