"""POST /tokenize and /detokenize, GET /tokenizer_info: what the model sees of a text."""

import json

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answer_schemas import Text, TokenizerInfo, Tokens
from server.openapi import OF_BODIES, errors, gives, takes
from server.protocol import DetokenizeRequest, TokenizeRequest
from server.serving import Serving, read_body

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", openapi_extra=takes(TokenizeRequest), responses=gives(Tokens) | errors(*OF_BODIES))
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation."""
    serving = Serving.of(request)
    body = await read_body(request, TokenizeRequest)
    serving.model(body.model)
    if body.messages is not None:
        ids = await serving.render(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
            tools=body.tools or (),
        )
    else:
        special = body.add_special_tokens is not False
        (ids,) = await serving.encode([body.prompt or ""], add_special_tokens=special, param="prompt")
    # Written here: FastAPI's own way goes through a long list item by item in Python.
    content = {"tokens": ids, "count": len(ids), "max_model_len": serving.engine.max_model_len}
    return Response(json.dumps(content), media_type="application/json")


@router.post("/detokenize", openapi_extra=takes(DetokenizeRequest), responses=errors(*OF_BODIES))
async def detokenize(request: Request) -> Text:
    """The text of token ids, special tokens included."""
    serving = Serving.of(request)
    body = await read_body(request, DetokenizeRequest)
    serving.model(body.model)
    await serving.check_prompts([body.tokens], "tokens")
    (text,) = await serving.decode([body.tokens], skip_special_tokens=False)
    return Text(prompt=text)


@router.get("/tokenizer_info", responses=errors())
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """What a client needs to prepare prompts itself, beside the two others; lm-eval does."""
    serving = Serving.of(request)
    tokenizer, template = serving.engine.tokenizer, serving.template
    return TokenizerInfo(
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        chat_template=None if template is None else template.source,
    )
