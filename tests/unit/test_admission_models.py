"""attach(admission=): models in threads share a pool."""

import copy

import pytest
import torch

import kvruntime
from kvruntime import Admission
from tests.waiting import in_threads, is_empty


def test_models_in_threads_share_a_pool(tiny_model):
    """attach(admission=): each thread has a model of its own, and all draw as they do alone."""
    labels = torch.tensor([0, 2])
    models = [copy.deepcopy(tiny_model) for _ in range(3)]
    policies = [("full", 1.0), ("scalekv", 0.5), ("centroid", 0.4)]
    wanted, plans = [], []
    for model, (policy, budget) in zip(models, policies, strict=True):
        with kvruntime.attach(model, policy, budget) as attached:
            wanted.append(model.generate(labels, seed=3))
            plans.append(attached.plan(2))
    pool = kvruntime.Pool(
        num_pages=max(plan.peak_pages for plan in plans),
        page_bytes=max(plan.bytes_per_page for plan in plans),
        plane_bytes=max(plan.plane_bytes_per_page for plan in plans),
    )
    admission = Admission(pool)
    drawn = [[], [], []]

    def work(number):
        policy, budget = policies[number]
        with kvruntime.attach(models[number], policy, budget, admission=admission) as attached:
            for seed in range(3, 6):
                drawn[number].append(models[number].generate(labels, seed=seed))
            ticket = admission.submit(attached.plan(2))
            attached.use(ticket)
            drawn[number].append(models[number].generate(labels, seed=3))
            assert ticket.has_started and not attached.stats.live_pages

    in_threads(*(lambda number=number: work(number) for number in range(3)))
    for ours, own in zip(drawn, wanted, strict=True):
        assert torch.equal(ours[0], own) and torch.equal(ours[3], own)
        assert not torch.equal(ours[1], own), "another seed"
    assert is_empty(admission)


def test_a_ticket_that_a_call_did_not_use_is_given_up(tiny_model):
    admission = Admission(kvruntime.Pool(num_pages=200, page_bytes=2**16, plane_bytes=2**10))
    with kvruntime.attach(tiny_model, "full", 1.0, admission=admission) as attached:
        tickets = [admission.submit(attached.plan(1)) for _ in range(2)]
        attached.use(tickets[0])
        with pytest.raises(IndexError):
            tiny_model.generate(torch.tensor([10**6]), seed=0)
        attached.use(tickets[1])
    assert [ticket.is_cancelled for ticket in tickets] == [True, True] and is_empty(admission)


def test_a_run_that_fails_in_the_model_leaves(tiny_model):
    admission = Admission(kvruntime.Pool(num_pages=200, page_bytes=2**16, plane_bytes=2**10))
    with kvruntime.attach(tiny_model, "full", 1.0, admission=admission):
        with pytest.raises(IndexError):
            tiny_model.generate(torch.tensor([10**6]), seed=0)
        tiny_model.generate(torch.tensor([1]), seed=0)
        assert is_empty(admission)
