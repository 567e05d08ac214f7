"""Jobs that wait, taken in turn from every client: one client's many requests do not delay another's first."""

import collections
from collections.abc import Iterator

from dmm_jax.serve.requests import Job


class FairQueue:
    """Waiting jobs by client; the clients take turns, and each client's jobs keep their order."""

    def __init__(self) -> None:
        self._jobs: collections.OrderedDict[str, collections.deque[Job]] = collections.OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._jobs.values() for job in jobs)

    def push(self, job: Job) -> None:
        """Adds a job after its client's others; a new client's turn comes last."""
        self._jobs.setdefault(job.client, collections.deque()).append(job)

    def pop(self) -> Job:
        """Removes and returns the next job; its client's next turn comes after all others'."""
        client, jobs = self._jobs.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._jobs[client] = jobs
        return job

    def discard(self, job: Job) -> None:
        """Removes a job if it waits."""
        jobs = self._jobs.get(job.client, ())
        if job in jobs:
            jobs.remove(job)
        if not jobs:
            self._jobs.pop(job.client, None)

    def num_ahead(self, job: Job) -> int:
        """Returns how many jobs are taken before this one, if no others come; 0 for a job that does not wait."""
        own = self._jobs.get(job.client, ())
        if job not in own:
            return 0
        rounds, ahead, before = own.index(job), 0, True  # `rounds` jobs of its own client come first.
        for client, jobs in self._jobs.items():
            before = before and client != job.client
            ahead += rounds if client == job.client else min(len(jobs), rounds + before)
        return ahead
