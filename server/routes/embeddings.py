"""POST /v1/embeddings."""

import asyncio
import json
import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.sampling_params import SamplingParams
from server.answer_schemas import Embeddings
from server.answers import collect, head_of
from server.embeddings import EmbeddingRequest, written
from server.generation import Generation
from server.openapi import OF_GENERATION, errors, gives, takes
from server.serving import Serving, read_body
from server.standing import Standing

router = APIRouter(tags=["embeddings"])

_INLINE_NUMBERS = 16384
"""Numbers that are written at once (a few milliseconds); more in a thread, vector by vector, to hold up nobody."""


@router.post(
    "/v1/embeddings",
    openapi_extra=takes(EmbeddingRequest),
    responses=gives(Embeddings) | errors(*OF_GENERATION),
)
async def embeddings(request: Request) -> Response:
    """One vector for each of the inputs."""
    arrival = time.monotonic()
    serving, body = Serving.of(request), await read_body(request, EmbeddingRequest)
    head = head_of("embd", "list", serving.model(body.model))
    generation = await _start(serving, body, serving.standing(request, body, arrival), head["id"])
    await collect(generation, len(body.input), request)

    def write() -> list[str]:
        return [
            written(
                generation.embedding(index),
                normalize=body.normalize is not False,
                encoding=body.encoding_format or "float",
            )
            for index in range(len(body.input))
        ]

    large = len(body.input) * serving.engine.hidden_size > _INLINE_NUMBERS
    vectors = await asyncio.to_thread(write) if large else write()
    data = ",".join(
        f'{{"object": "embedding", "index": {index}, "embedding": {vector}}}' for index, vector in enumerate(vectors)
    )
    usage = {name: value for name, value in generation.usage.items() if name != "completion_tokens"}
    content = f'{json.dumps(head)[:-1]}, "data": [{data}], "usage": {json.dumps(usage)}}}'
    return Response(content, media_type="application/json")


async def _start(serving: Serving, body: EmbeddingRequest, standing: Standing, request_id: str) -> Generation:
    policy = serving.kv_policy(body)
    body.check_dimensions(serving.engine.hidden_size)
    prompts = await serving.tokenize(body.input, add_special_tokens=body.add_special_tokens, param="input")
    serving.room(prompts, 0, "input", policy=policy)
    return Generation.submit(
        serving,
        prompts,
        SamplingParams(max_tokens=0, pooling=body.pooling or "mean"),
        standing,
        kv_policy=policy,
        cache_salt=body.cache_salt,
        request_id=request_id,
        param="input",
    )
