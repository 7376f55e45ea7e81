"""Few cases in which any two values of different axes meet."""

from itertools import combinations, product


def pairwise(axes, is_possible=lambda case: True):
    """Cases, a value of each axis, greedily chosen until every pair that is possible at all has
    been seen.
    """
    every = [case for case in product(*axes) if is_possible(case)]
    places = list(combinations(range(len(axes)), 2))

    def pairs(case):
        return {(i, j, case[i], case[j]) for i, j in places}

    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        best = max(every, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen
