"""A beam search under way: gathers what the model says of each beam, and takes a step once all are as far.

The beams of one request need not be computed in the same step: under a small token budget, or after a preemption,
some are ahead. Those wait, parked, until the last one has brought its candidates.
"""

from engine.beam_search import BeamParams, BeamSearch, Candidate, Hypothesis
from scheduler.request import Request, Sequence
from scheduler.scheduler import Scheduler


class BeamProgress:
    """Joins a request's `BeamSearch`, which knows tokens and likelihoods, to its sequences, which hold the KV."""

    def __init__(self, request: Request, params: BeamParams, *, num_top: int) -> None:
        self._request = request
        self._search = BeamSearch(request.num_places, params, request.stop, num_top=num_top)
        self._beams = list(request.sequences)
        self._brought: dict[Sequence, tuple[Candidate, ...]] = {}

    @property
    def num_candidates(self) -> int:
        """How many of its most likely next tokens each beam has to bring."""
        return self._search.num_candidates

    def bring(self, beam: Sequence, candidates: tuple[Candidate, ...]) -> bool:
        """Note a beam's most likely next tokens. True if it was the last one: now all can advance."""
        self._brought[beam] = candidates
        return len(self._brought) == len(self._beams)

    def advance(self, scheduler: Scheduler) -> bool:
        """Take a step. True if that ended the search, and the sequences."""
        extensions = self._search.advance([self._brought[beam] for beam in self._beams])
        self._brought = {}
        if not extensions:
            for beam in self._beams:
                scheduler.finish(beam, "stop")
            return True
        choices = [(self._beams[extension.parent], extension.token) for extension in extensions]
        self._beams = scheduler.advance(self._request, choices)
        return False

    @property
    def found(self) -> list[Hypothesis]:
        """All that was found, best first, once the search has ended."""
        return self._search.best(self._request.num_places)
