// The `openai` package for Node against a running server; Node's own test runner counts.
// The client finds the server by its own variables, OPENAI_BASE_URL and OPENAI_API_KEY.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ maxRetries: 0, timeout: 60_000 });
const model = "SmolLM2-135M-Instruct";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const asked = { model, messages, temperature: 0, max_completion_tokens: 16 };
const Country = z.object({ continent: z.enum(["Africa", "Asia", "Europe"]), landlocked: z.boolean() });
const City = z.object({ city: z.enum(["Rome", "Paris"]) });
const forced = { type: "function", function: { name: "weather" } };

test("models are listed and retrieved", async () => {
  const ids = [];
  for await (const one of client.models.list()) ids.push(one.id);
  assert.deepEqual(ids, [model]);
  assert.equal((await client.models.retrieve(model)).object, "model");
});

test("a chat is answered", async () => {
  const answer = await client.chat.completions.create(asked);
  assert.match(answer.choices[0].message.content, /Paris/);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.ok(answer._request_id);
});

test("a chat streams what it answers whole", async () => {
  const whole = await client.chat.completions.create(asked);
  const stream = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the helper for streams accumulates", async () => {
  const runner = client.chat.completions.stream({ ...asked, stream: true });
  let text = "";
  runner.on("content", (delta) => (text += delta));
  assert.equal(await runner.finalContent(), text);
  assert.match(text, /Paris/);
});

test("a stream can be aborted", async () => {
  const stream = await client.chat.completions.create({ ...asked, max_completion_tokens: 300, stream: true });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
  await client.chat.completions.create(asked);
});

test("several choices, and their log-probabilities", async () => {
  const { choices } = await client.chat.completions.create({
    ...asked,
    n: 2,
    temperature: 1,
    seed: 3,
    logprobs: true,
    top_logprobs: 2,
  });
  assert.deepEqual(choices.map((choice) => choice.index), [0, 1]);
  assert.ok(choices[0].logprobs.content.every((token) => token.logprob <= 0 && token.top_logprobs.length === 2));
});

test("completions, whole and streamed", async () => {
  const body = { model, prompt: ["Two, four, six,", "One"], max_tokens: 6, temperature: 0 };
  const whole = await client.completions.create(body);
  const texts = ["", ""];
  for await (const chunk of await client.completions.create({ ...body, stream: true })) {
    texts[chunk.choices[0].index] += chunk.choices[0].text;
  }
  assert.deepEqual(texts, whole.choices.map((choice) => choice.text));
});

test("a prompt is scored", async () => {
  const body = { model, prompt: "The sky is blue", max_tokens: 0, echo: true, logprobs: 1 };
  const { logprobs } = (await client.completions.create(body)).choices[0];
  assert.equal(logprobs.token_logprobs[0], null);
  assert.equal(logprobs.tokens.join(""), "The sky is blue");
});

test("a schema of zod is parsed", async () => {
  const answer = await client.chat.completions.parse({
    ...asked,
    max_completion_tokens: 60,
    response_format: zodResponseFormat(Country, "country"),
  });
  assert.ok(Country.safeParse(answer.choices[0].message.parsed).success);
});

test("a tool of zod is called and parsed", async () => {
  const answer = await client.chat.completions.parse({
    ...asked,
    max_completion_tokens: 60,
    tools: [zodFunction({ name: "weather", parameters: City })],
    tool_choice: forced,
  });
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  assert.ok(City.safeParse(answer.choices[0].message.tool_calls[0].function.parsed_arguments).success);
});

test("a tool call streams", async () => {
  const runner = client.chat.completions.stream({
    ...asked,
    max_completion_tokens: 60,
    tools: [zodFunction({ name: "weather", parameters: City })],
    tool_choice: forced,
  });
  const { message } = (await runner.finalChatCompletion()).choices[0];
  assert.ok(City.safeParse(JSON.parse(message.tool_calls[0].function.arguments)).success);
});

test("the helper runs tools until the model answers", async () => {
  const cities = [];
  const runner = client.chat.completions.runTools(
    {
      ...asked,
      max_completion_tokens: 60,
      tools: [
        {
          type: "function",
          function: {
            name: "weather",
            parameters: z.toJSONSchema(City),
            parse: JSON.parse,
            function: ({ city }) => cities.push(city) && "sunny",
          },
        },
      ],
      tool_choice: forced,
    },
    { maxChatCompletions: 1 },
  );
  await runner.done();
  assert.equal(cities.length, 1);
});

for (const [fields, kind, code] of [
  [{ model: "other" }, OpenAI.NotFoundError, "model_not_found"],
  [{ temperature: 3 }, OpenAI.BadRequestError, null],
  [{ messages: [] }, OpenAI.BadRequestError, null],
  [{ max_completion_tokens: 1e6 }, OpenAI.BadRequestError, "context_length_exceeded"],
]) {
  test(`an error has its class: ${JSON.stringify(fields)}`, async () => {
    const error = await client.chat.completions.create({ ...asked, ...fields }).catch((raised) => raised);
    assert.ok(error instanceof kind);
    assert.equal(error.code, code);
    assert.ok(error.requestID);
  });
}

test("a wrong key is an authentication error", async () => {
  const other = new OpenAI({ apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(other.models.list(), OpenAI.AuthenticationError);
});

test("a client's timeout is its own error", async () => {
  const body = { ...asked, max_completion_tokens: 1000, ignore_eos: true };
  await assert.rejects(client.chat.completions.create(body, { timeout: 50 }), OpenAI.APIConnectionTimeoutError);
});

test("raw responses show headers", async () => {
  const { data, response } = await client.chat.completions
    .create(asked, { headers: { "X-Request-Id": "mine" } })
    .withResponse();
  assert.equal(response.headers.get("x-request-id"), "mine");
  assert.equal(data.object, "chat.completion");
});
