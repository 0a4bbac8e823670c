"""langchain-openai against a running server, which it finds by OPENAI_BASE_URL and OPENAI_API_KEY."""

import asyncio
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"


class Country(BaseModel):
    """A country."""

    continent: Literal["Africa", "Asia", "Europe"]
    landlocked: bool


@tool
def weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def chat(**arguments: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": MODEL, "temperature": 0, "max_tokens": 60, "max_retries": 0, **arguments})


def test_a_question_is_answered() -> None:
    answer = chat().invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)])
    assert "Paris" in answer.content
    assert answer.usage_metadata
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == MODEL


def test_a_stream_is_the_answer_in_pieces() -> None:
    chunks = list(chat(stream_usage=True).stream(QUESTION))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.content == chat().invoke(QUESTION).content
    assert total.usage_metadata is not None
    assert total.usage_metadata["output_tokens"] > 0


def test_asynchronous_streams() -> None:
    async def collect() -> str:
        return "".join([str(chunk.content) async for chunk in chat().astream(QUESTION)])

    assert "Paris" in asyncio.run(collect())


def test_a_batch_and_a_chain() -> None:
    chain = ChatPromptTemplate.from_messages([("human", "What is the capital of {country}?")]) | chat()
    answers = chain.batch([{"country": "France"}, {"country": "Germany"}])
    assert ["Paris" in answers[0].content, "Berlin" in answers[1].content] == [True, True]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method: Any) -> None:
    model = chat().with_structured_output(Country, method=method)
    assert isinstance(model.invoke("Tell me about France."), Country)


def test_structured_output_streams() -> None:
    *_, last = chat().with_structured_output(Country, method="json_schema").stream("Tell me about France.")
    assert isinstance(last, Country)


def test_json_cut_short_is_an_error() -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        chat(max_tokens=1, model_kwargs={"response_format": {"type": "json_object"}}).invoke("Describe France.")


@pytest.mark.parametrize("choice", ["weather", "required", "any"])
def test_a_tool_is_called_and_its_result_is_taken(choice: str) -> None:
    model = chat(max_tokens=200).bind_tools([weather], tool_choice=choice, parallel_tool_calls=False)
    called = model.invoke("What is the weather in Paris?")
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = chat().bind_tools([weather]).invoke([HumanMessage("What is the weather in Paris?"), called, result])
    assert isinstance(answer, AIMessage)


def test_a_tool_call_streams() -> None:
    model = chat(max_tokens=200).bind_tools([weather], tool_choice="weather", strict=True)
    chunks = list(model.stream("What is the weather in Paris?"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    (call,) = total.tool_calls  # type: ignore[attr-defined]
    assert call["args"]["city"] in ("Rome", "Paris")


def test_log_probabilities() -> None:
    answer = chat(logprobs=True, top_logprobs=2, max_tokens=3).invoke(QUESTION)
    assert len(answer.response_metadata["logprobs"]["content"]) == 3


def test_completions() -> None:
    model = OpenAI(model=MODEL, temperature=0, max_tokens=8, max_retries=0)
    text = model.invoke("Two, four, six,")
    assert text == "".join(model.stream("Two, four, six,"))
    assert len(model.generate(["One", "Two"]).generations) == 2


def test_errors_come_through() -> None:
    with pytest.raises(openai.BadRequestError):
        chat(temperature=5).invoke(QUESTION)
    with pytest.raises(openai.NotFoundError):
        chat(model="other").invoke(QUESTION)
