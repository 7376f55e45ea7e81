"""What policies are asked about and take their budgets from, made up."""

import numpy as np

from policies import CacheGeometry, Problem, Profile


def problem_of(schedule, budget=1):
    """What a policy is asked about, where only the schedule matters."""
    return Problem(CacheGeometry(1, 1, 4), schedule, budget)


def profile_of(schedule, layers, heads=None, seed=0, head_dim=4):
    """A well-formed profile with random statistics; of version 1 without heads."""
    rng = np.random.default_rng(seed)

    def table():
        return rng.random((len(schedule), layers)).tolist()

    by_head = {}
    if heads:
        mass = [
            np.moveaxis(rng.dirichlet(np.ones(scale + 1), (layers, heads)), 2, 0).tolist()
            for scale in range(len(schedule))
        ]
        by_head = {
            "mass": mass,
            "column_variance": rng.random((layers, heads)).tolist(),
            "query_means": rng.normal(size=(len(schedule), layers, heads, head_dim)).tolist(),
            "fold_tokens": (1, 4, 20),
            "fold_errors": np.sort(rng.random((3, len(schedule), layers, heads)), axis=0)[
                ::-1
            ].tolist(),
        }
    return Profile(
        version=2 if heads else 1,
        model="test",
        sizes=schedule.sizes,
        pictures=1,
        selectivity=table(),
        similarity=table(),
        cached_mass=table(),
        **by_head,
    )
