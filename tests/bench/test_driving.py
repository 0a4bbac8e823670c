import asyncio
import json
from collections.abc import Iterator

import pytest

from bench.arrivals import ClosedLoop, OpenLoop
from bench.client import Client, Server
from bench.driving import bodies, drive, recording, warm_up
from bench.measure import RequestRecord, Run
from bench.prompts import Prompt
from bench.sse import Stream
from engine.errors import OctavoError
from tests.bench.fake_openai import FakeServer, serving

PROMPTS = [Prompt([1, 2, 3], length) for length in (4, 1, 3, 2)]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving(FakeServer()) as server:
        yield server


def test_bodies_ask_for_greedy_streams_of_exactly_the_length() -> None:
    (body,) = map(json.loads, bodies([Prompt([1, 2], 7)], "m"))
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("m", [1, 2], 7)
    assert (body["temperature"], body["ignore_eos"], body["stream"]) == (0, True, True)
    assert body["stream_options"] == {"include_usage": True}


async def test_a_level_is_driven_and_every_request_has_its_record(fake: FakeServer) -> None:
    async with Client(Server(fake.url)) as client:
        run = await drive(client, ClosedLoop(2), PROMPTS, "m", label="static", repeat=1, seed="s")
    assert (run.label, run.repeat, run.interrupted) == ("static", 1, 0)
    assert [body["max_tokens"] for body in fake.bodies] == [4, 1, 3, 2]
    assert sorted((r.index, r.output_tokens, r.asked_tokens, r.error) for r in run.records) == [
        (0, 4, 4, None),
        (1, 1, 1, None),
        (2, 3, 3, None),
        (3, 2, 2, None),
    ]
    assert fake.most_in_flight <= 2
    assert run.duration == max(r.last for r in run.records) - min(r.start for r in run.records)


async def test_an_open_loop_remembers_when_it_meant_to_send(fake: FakeServer) -> None:
    async with Client(Server(fake.url)) as client:
        run = await drive(client, OpenLoop(1000.0), PROMPTS, "m", label="x", repeat=0, seed="s")
    assert all(r.scheduled is not None and 0 <= r.start - r.scheduled < 1 for r in run.records)


async def test_a_failed_request_is_a_record_and_not_an_exception(fake: FakeServer) -> None:
    fake.broken = frozenset({1})
    async with Client(Server(fake.url)) as client:
        run = await drive(client, ClosedLoop(1), PROMPTS, "m", label="x", repeat=0, seed="s")
    assert [r.error for r in sorted(run.records, key=lambda r: r.index)] == [None, "HTTP 500: it broke", None, None]


async def test_warm_up_requests_are_sent_at_once_and_none_may_fail(fake: FakeServer) -> None:
    fake.first_delay = 0.02
    async with Client(Server(fake.url)) as client:
        await warm_up(client, PROMPTS, "m")
        assert fake.most_in_flight == 4
        fake.broken = frozenset({6})
        with pytest.raises(OctavoError, match=r"^a warm-up request failed: HTTP 500: it broke$"):
            await warm_up(client, PROMPTS, "m")


def test_a_run_is_recorded_however_it_ends() -> None:
    runs: list[Run] = []
    late, early, unfinished = (RequestRecord(index, start=index) for index in range(3))
    for record, last in ((late, 9.0), (early, 5.0)):
        record.chunk_times.append(last)
        record.last = last

    def interrupted() -> None:
        with recording("x", 0, runs) as sent:
            sent += [late, early, unfinished]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (run,) = runs
    assert list(run.records) == [early, late]
    assert (run.duration, run.interrupted) == (9.0, 1)


async def test_an_answer_can_be_followed_while_it_comes(fake: FakeServer) -> None:
    fake.gap = 0.01
    stream = Stream()
    async with Client(Server(fake.url)) as client:
        task = asyncio.create_task(client.follow(bodies([Prompt([1], 500)], "m")[0], stream))
        while len(stream.chunk_times) < 3:
            assert not task.done()
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(500):
            if fake.in_flight == 0:
                break
            await asyncio.sleep(0.01)
    assert fake.in_flight == 0, "the server was not hung up on"
    assert fake.hung_up == 1


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ({"broken": frozenset({0})}, r"/v1/completions: HTTP 500: it broke"),
        ({"cut": frozenset({0})}, r"broke off in the middle"),
        ({"tokens_per_chunk": 9}, r"the answer holds no streamed token"),
    ],
)
async def test_following_an_answer_that_fails_raises_in_one_line(
    fake: FakeServer, behaviour: dict[str, object], told: str
) -> None:
    for name, value in behaviour.items():
        setattr(fake, name, value)
    async with Client(Server(fake.url)) as client:
        with pytest.raises(OctavoError, match=told) as caught:
            await client.follow(bodies([Prompt([1], 8)], "m")[0], Stream())
    assert "\n" not in str(caught.value)


async def test_a_page_that_is_not_there_or_a_server_that_is_not_is_one_line(fake: FakeServer) -> None:
    async with Client(Server(f"{fake.url}/v1/")) as client:
        assert "octavo:generation_tokens_total" in await client.page("/metrics")
        with pytest.raises(OctavoError, match=r"/absent answered HTTP 404$"):
            await client.page("/absent")
    async with Client(Server("http://127.0.0.1:1")) as client:
        with pytest.raises(OctavoError, match="cannot connect: Connection refused"):
            await client.page("/metrics")
