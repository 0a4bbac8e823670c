"""Requests that have not run yet, and which of them is next.

`fcfs`: first come, first served. `priority`: the lower number first, and waiting makes up for it: ``ageing`` seconds
count as one level, so whatever a request's priority, it is overtaken for a bounded time only. `fair`: the tenant that
was given the fewest tokens first, and within a tenant as under `priority`; a tenant that comes back begins level with
the one served last, so that being away earns nothing (virtual token counter: Sheng et al. 2024, *Fairness in Serving
Large Language Models*, §4.1), and ``ageing`` seconds of waiting count as `TOKENS_PER_AGEING` tokens not given.
"""

from collections import OrderedDict
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Literal

from scheduler.request import Rank, Request

TOKENS_PER_AGEING = 1000
_MAX_TENANTS_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Who is served first."""

    policy: Literal["fcfs", "priority", "fair"] = "fcfs"
    ageing: float = 10.0
    """Seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.ageing < inf:
            raise ValueError(f"ageing takes more than no time and not for ever, not {self.ageing} seconds")

    def rank(self, request: Request, serial: int) -> Rank:
        """Where a request stands among all, for as long as it lives; lower goes first.

        Under fair sharing its priority is its tenant's own affair (`turn`), and makes no room at others' cost.
        """
        return self._rank(request, serial, self.policy == "priority")

    def turn(self, request: Request) -> Rank:
        """Where a request, whose rank is set, stands among those of its tenant that wait."""
        return self._rank(request, request.rank[1], self.policy != "fcfs")

    def _rank(self, request: Request, serial: int, by_priority: bool) -> Rank:
        return (request.priority * self.ageing * by_priority + request.arrival, serial)


class WaitingQueue:
    """The requests by tenant; without fair sharing all belong to one."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._members: OrderedDict[Request, None] = OrderedDict()  # in order of arrival
        self._heaps: dict[str, list[tuple[Rank, Request]]] = {}  # what has left is dropped when it comes up
        self._served: dict[str, float] = {}
        self._level = 0.0  # what the tenant served last had been given
        self.num_tokens = 0
        """Prompt tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    @property
    def oldest(self) -> Request | None:
        """The one that came first, whoever is served next."""
        return next(iter(self._members), None)

    def add(self, request: Request) -> None:
        """Queue a request, whose rank is set."""
        tenant = self._tenant(request)
        heap = self._heaps.get(tenant)
        if heap is None:
            heap = self._heaps[tenant] = []
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._level)
        heappush(heap, (self._order.turn(request), request))
        self._members[request] = None
        self.num_tokens += request.num_prompt_tokens

    def remove(self, request: Request) -> None:
        """Take a request out; nothing happens if it is not in."""
        if request not in self._members:
            return
        del self._members[request]
        self.num_tokens -= request.num_prompt_tokens
        tenant = self._tenant(request)
        heap = self._heaps[tenant]
        if len(heap) > 64 + 2 * len(self._members):  # most have left before they came up
            heap[:] = [entry for entry in heap if entry[1] in self._members]
            heapify(heap)
        while heap and heap[0][1] not in self._members:
            heappop(heap)
        if not heap:
            del self._heaps[tenant]

    def head(self) -> Request | None:
        """Who is next."""
        if not self._members:
            return None
        heads = (heap[0][1] for heap in self._heaps.values())
        return min(heads, key=self._score)

    def first(self, count: int) -> list[Request]:
        """Who is next if ``count`` are to run together, and none of them is charged before all are chosen."""
        lines = [sorted(entry for entry in heap if entry[1] in self._members) for heap in self._heaps.values()]
        chosen: list[Request] = []
        while len(chosen) < min(count, len(self._members)):
            line = min(filter(None, lines), key=lambda line: self._score(line[0][1]))
            chosen.append(line.pop(0)[1])
        return chosen

    def admit(self, request: Request) -> None:
        """Take out a request, since it runs now."""
        self._level = max(self._level, self._served[self._tenant(request)])
        self.remove(request)

    def charge(self, request: Request, num_tokens: int) -> None:
        """Note that a request's tenant was given ``num_tokens``; for fair sharing only."""
        self._served[request.tenant] = self._served.get(request.tenant, self._level) + num_tokens
        if len(self._served) - len(self._heaps) > _MAX_TENANTS_REMEMBERED:
            self._forget_tenants()

    def _score(self, request: Request) -> tuple[float, Rank]:
        waiting_since = request.arrival * TOKENS_PER_AGEING / self._order.ageing
        return (self._served[self._tenant(request)] + waiting_since, request.rank)

    def _tenant(self, request: Request) -> str:
        return request.tenant if self._order.policy == "fair" else ""

    def _forget_tenants(self) -> None:
        """Forget half of the tenants that have nothing waiting: those given least, who would begin nearest level."""
        away = sorted((tenant for tenant in self._served if tenant not in self._heaps), key=self._served.__getitem__)
        for tenant in away[: len(away) // 2 + 1]:
            del self._served[tenant]
