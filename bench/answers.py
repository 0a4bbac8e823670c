"""Answers of the engine itself to lists of prompts, each under a KV policy: what a client would have got."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from engine.async_engine import AsyncEngine
from engine.kv_policies.policy import KVPolicy
from engine.request_state import RequestStream
from engine.sampling_params import SamplingParams


class Answering:
    """A running engine, for one caller without an event loop of its own."""

    def __init__(self, engine: AsyncEngine, runner: asyncio.Runner) -> None:
        self.engine = engine
        self._runner = runner

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        policy: KVPolicy,
        max_tokens: int,
        on_answer: Callable[[], object] = lambda: None,
    ) -> list[list[int]]:
        """The tokens of each answer, of ``max_tokens`` at most; all prompts are asked at once.

        Raises InvalidRequestError for a prompt, or a policy, that the engine refuses.
        """
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)

        async def read(stream: RequestStream) -> list[int]:
            tokens = [token async for output in stream for token in output.token_ids]
            on_answer()
            return tokens

        async def ask() -> list[list[int]]:
            streams = [
                self.engine.submit(prompt, params, request_id=f"{index}", kv_policy=policy)
                for index, prompt in enumerate(prompts)
            ]
            return await asyncio.gather(*map(read, streams))

        return self._runner.run(ask())


@contextmanager
def answering(engine: AsyncEngine) -> Iterator[Answering]:
    """Start an engine; it stops when the block ends."""
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        try:
            yield Answering(engine, runner)
        finally:
            runner.run(engine.stop())
