"""Waiting jobs: clients take turns, and a job knows how many come before it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dmm_jax.serve.fair_queue import FairQueue
from dmm_jax.serve.requests import ImageRequest, Job
from dmm_jax.serve.work import Work
from dmm_jax.text.prompt_chunks import PromptTokens

TOKENS = PromptTokens(np.zeros((1, 1, 77), np.int32), np.ones((1, 1, 77), np.float32))
WORK = Work((64, 64), 0, TOKENS, 1.0, np.zeros((1, 20), np.float32))


def job(client, number=0):
    """Returns a job whose seed is its number."""
    return Job(ImageRequest("a star", seed=number), WORK, client, lambda job: 0)


def drained(queue):
    return [queue.pop() for _ in range(len(queue))]


def test_a_client_with_one_job_comes_second_at_latest():
    queue = FairQueue()
    for number in range(5):
        queue.push(job("busy", number))
    queue.push(job("quiet"))
    assert [each.client for each in drained(queue)] == ["busy", "quiet", "busy", "busy", "busy", "busy"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["push", "push", "pop", "discard"])), max_size=30))
def test_jobs_ahead_are_those_taken_first(actions):
    queue, waiting = FairQueue(), []
    for number, (client, action) in enumerate(actions):
        if action == "push":
            waiting.append(job(client, number))
            queue.push(waiting[-1])
        elif action == "pop" and waiting:
            waiting.remove(queue.pop())
        elif action == "discard" and waiting:
            queue.discard(waiting.pop(number % len(waiting)))
    assert sorted(each.request.seed for each in queue) == sorted(each.request.seed for each in waiting)
    ahead = {each.request.seed: queue.num_ahead(each) for each in waiting}
    order = [each.request.seed for each in drained(queue)]
    assert [ahead[number] for number in order] == list(range(len(order)))
    for client in "abc":
        own = [number for number in order if number in {each.request.seed for each in waiting if each.client == client}]
        assert own == sorted(own)


def test_a_job_that_does_not_wait_has_none_ahead():
    queue = FairQueue()
    queue.push(job("a"))
    assert queue.num_ahead(job("a", 7)) == queue.num_ahead(job("b")) == 0
    queue.discard(job("b"))
    assert len(queue) == 1
