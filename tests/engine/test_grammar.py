"""Outputs that match a grammar, whatever the model would rather say: a random one, which says anything."""

import asyncio
import json
import random
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine import grammar_compiler, grammar_matcher
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.grammar import Grammar
from engine.grammar_compiler import GrammarCompiler
from engine.launch import LoadedModel, assemble, load_model
from engine.models.decoder import Decoder
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from tests.engine.checkpoints import byte_tokenizer, random_model, save
from tests.engine.driving import Answer, PreemptionCount, ask, generate

PROMPT = [10, 20, 30, 40, 50]
END = 2
CHOICES = ["Paris", 'a "quoted"\nline', "back\\slash", "naïve 😀", " "]
EXACT = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": False}


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def choice(*texts: str) -> Grammar:
    return Grammar("choice", json.dumps(texts))


def constrained(grammar: Grammar, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"grammar": grammar, "max_tokens": 200, "seed": 1, **fields})


def answer(tiny: LoadedModel, grammar: Grammar, **fields: Any) -> Answer:
    """What comes out, and that it ended where nothing may follow."""
    (one,) = generate(tiny, [PROMPT], constrained(grammar, **fields))
    return one


def reasons(one: Answer) -> list[str]:
    return [output.finish_reason for output in one.outputs if output.finish_reason]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_regular_expression_matches_the_whole_text(tiny: LoadedModel, temperature: float) -> None:
    one = answer(tiny, Grammar("regex", "[a-c]{4}-[0-9]{2,3}x"), temperature=temperature)
    assert re.fullmatch("[a-c]{4}-[0-9]{2,3}x", one.text[0])
    assert reasons(one) == ["stop"]


def test_each_of_several_continuations_matches_on_its_own(tiny: LoadedModel) -> None:
    one = answer(tiny, Grammar("regex", "[a-z]{3,9}!"), n=8)
    assert len(one.text) == 8
    assert len(set(one.text.values())) == 8
    assert all(re.fullmatch("[a-z]{3,9}!", text) for text in one.text.values())
    assert reasons(one) == ["stop"] * 8


def test_a_choice_is_one_of_its_texts_to_the_letter(tiny: LoadedModel) -> None:
    one = answer(tiny, choice(*CHOICES), n=32)
    assert set(one.text.values()) <= set(CHOICES)
    assert len(set(one.text.values())) > 1


def test_json_of_a_schema_is_valid(tiny: LoadedModel) -> None:
    assert json.loads(answer(tiny, schema(EXACT)).text[0]) in ({"a": 1}, {"a": 22})


def test_a_json_object_is_one(tiny: LoadedModel) -> None:
    one = answer(tiny, Grammar("json_object"), logit_bias={tiny_token("}"): 8.0})
    assert isinstance(json.loads(one.text[0]), dict)
    assert reasons(one) == ["stop"]


@pytest.mark.parametrize("text", ['start: "ab" start | "c"', 'root ::= "ab" root | "c"'])
def test_grammars_are_written_in_lark_or_gbnf(tiny: LoadedModel, text: str) -> None:
    one = answer(tiny, Grammar("lark", text), logit_bias={tiny_token("c"): 4.0})
    assert re.fullmatch("(ab)*c", one.text[0])


def tiny_token(character: str) -> int:
    token = byte_tokenizer().token_to_id(character)
    assert token is not None
    return token


def test_the_text_ends_with_the_token_after_which_nothing_may_follow(tiny: LoadedModel) -> None:
    one = answer(tiny, choice("abc"))
    assert one.tokens[0] == [tiny_token(letter) for letter in "abc"]
    assert reasons(one) == ["stop"]


def test_where_more_may_follow_the_end_of_text_ends_it(tiny: LoadedModel) -> None:
    one = answer(tiny, Grammar("regex", "a{2,}"), logit_bias={END: 100.0})
    assert one.text[0] == "aa"
    assert one.tokens[0][-1] == END
    assert reasons(one) == ["stop"]


def test_it_ends_a_text_also_where_the_end_of_text_is_ignored(tiny: LoadedModel) -> None:
    one = answer(tiny, Grammar("regex", "a{2,}"), logit_bias={END: 100.0}, ignore_eos=True)
    assert (one.text[0], reasons(one)) == ("aa", ["stop"])


def test_a_text_that_is_cut_off_says_so(tiny: LoadedModel) -> None:
    one = answer(tiny, Grammar("regex", "a*b{9}"), max_tokens=5)
    assert (len(one.text[0]), reasons(one)) == (5, ["length"])


def test_a_text_that_is_complete_with_its_last_token_was_not_cut_off(tiny: LoadedModel) -> None:
    assert reasons(answer(tiny, choice("abcde"), max_tokens=5)) == ["stop"]


def test_a_stop_string_ends_it_before_its_end(tiny: LoadedModel) -> None:
    one = answer(tiny, choice("ab.cd"), stop=(".",))
    assert (one.text[0], reasons(one)) == ("ab", ["stop"])


def test_min_tokens_holds_back_the_end_of_text_while_the_grammar_leaves_others(tiny: LoadedModel) -> None:
    bias = {END: 100.0}
    assert answer(tiny, Grammar("regex", "a{2,}"), logit_bias=bias, min_tokens=7).text[0] == "a" * 7
    assert answer(tiny, Grammar("regex", "a{2,4}"), logit_bias=bias, min_tokens=7).text[0] == "aaaa"


def test_the_best_of_several_match(tiny: LoadedModel) -> None:
    one = answer(tiny, Grammar("regex", "[a-z]{3,9}!"), n=2, best_of=6)
    assert all(re.fullmatch("[a-z]{3,9}!", text) for text in one.text.values())
    assert len(one.text) == 2


def test_a_search_with_a_grammar_is_refused(tiny: LoadedModel) -> None:
    from engine.beam_search import BeamParams

    with pytest.raises(InvalidRequestError, match="beam search"):
        answer(tiny, choice("a"), beams=BeamParams(), n=2)


def test_neighbours_without_a_grammar_are_unchanged(tiny: LoadedModel) -> None:
    plain = SamplingParams(max_tokens=24, seed=5, ignore_eos=True)
    (alone,) = generate(tiny, [PROMPT], plain)
    mixed = generate(tiny, [PROMPT] * 5, [constrained(choice("abc")), plain, constrained(schema(EXACT)), plain, plain])
    assert [mixed[index].tokens for index in (1, 3, 4)] == [alone.tokens] * 3
    assert mixed[0].text[0] == "abc"
    assert json.loads(mixed[2].text[0])["a"] in (1, 22)


def test_a_grammar_outlives_preemption(tiny: LoadedModel) -> None:
    params = constrained(Grammar("regex", "([a-z]{4} ){12}"), seed=3, max_tokens=64)
    alone = generate(tiny, [PROMPT], params)[0].text
    seen = PreemptionCount()
    # Eight sequences of 65 tokens, and blocks of 16 for two of them.
    block = 2 * 2 * 16 * 16 * 4 * 3
    many = generate(
        tiny, [PROMPT] * 8, params, seen, kv_cache_memory=10 * block, prefix_caching=False, max_model_len=80
    )
    assert seen.preemptions > 0
    assert [one.text for one in many] == [alone] * 8


BAD = {
    "unclosed character class": Grammar("regex", "[a"),
    "look-around": Grammar("regex", "(?=a)b"),
    "backreferences": Grammar("regex", r"(a)\1"),
    "more than 4096": Grammar("regex", "a" * 5000),
    "Invalid type: objekt": schema({"type": "objekt"}),
    "Unimplemented keys": schema({"not": {"type": "string"}}),
    "Unknown format": schema({"type": "string", "format": "shape"}),
    "retrieving it failed": schema({"$ref": "http://example.com/schema"}),
    "object schema": schema([1]),
    "EOF while parsing": Grammar("json_schema", '{"a":'),
    "Unsatisfiable": schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
    "no text can match": schema({"$ref": "#"}),
    "recursion limit": Grammar("json_schema", '{"items":' * 500 + "{}" + "}" * 500),
    "more than 131072": schema({"const": "a" * 140_000}),
    "unknown name": Grammar("lark", "start: other"),
    "too deeply nested": Grammar("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "Expected": Grammar("lark", "root ::= )"),
    "recursion depth": Grammar("lark", "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000),
    "fuel": schema({"type": "integer", "multipleOf": 1_000_003, "minimum": 3}),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_grammar_is_refused_with_the_reason_in_one_line(reason: str) -> None:
    compiler = GrammarCompiler(Tokenizer(byte_tokenizer(), eos_token_ids=frozenset({END})), 320)
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as refused:
        asyncio.run(compiler.compile(BAD[reason]))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    compiler.close()


def chain(count: int) -> Grammar:
    """Definitions each of which needs the next: the library's compiler goes as deep."""
    names = {f"{i}": {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(count)}
    return schema({"$ref": "#/$defs/0", "$defs": {**names, f"{count}": {"type": "string"}}})


@pytest.mark.parametrize(
    "grammar",
    [
        chain(2500),
        Grammar("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"\n'),
    ],
    ids=["schema", "rules"],
)
def test_a_grammar_as_deep_as_its_length_allows_does_not_overflow_the_stack(grammar: Grammar) -> None:
    compiler = GrammarCompiler(Tokenizer(byte_tokenizer(), eos_token_ids=frozenset({END})), 320)
    (matcher,) = compiler.matchers(grammar, 1)
    assert any(matcher.mask())
    compiler.close()


def test_a_model_without_an_end_of_text_takes_no_grammar() -> None:
    compiler = GrammarCompiler(Tokenizer(byte_tokenizer()), 320)
    compiler.prepare()
    with pytest.raises(InvalidRequestError, match="no token that ends a text"):
        compiler.matchers(choice("a"), 1)
    compiler.close()


def engine_of(tiny: LoadedModel) -> AsyncEngine:
    return assemble(EngineConfig(kv_cache_memory=1 << 27), tiny)


async def test_others_are_served_while_a_grammar_is_compiled(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = engine_of(tiny), threading.Event()
    compiled = GrammarCompiler._compile

    def slow(self: GrammarCompiler, grammar: Grammar) -> object:
        assert gate.wait(10)
        return compiled(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", slow)
    await engine.start()
    compiling = asyncio.create_task(engine.grammars.compile(choice("abc")))
    await ask(engine, PROMPT, SamplingParams(max_tokens=8))
    assert not compiling.done()
    gate.set()
    await compiling
    assert (await ask(engine, PROMPT, constrained(choice("abc")), "s")).text[0] == "abc"
    await engine.stop()


async def test_equal_grammars_are_compiled_once(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, compiled = engine_of(tiny), []
    original = GrammarCompiler._compile
    monkeypatch.setattr(GrammarCompiler, "_compile", lambda self, one: compiled.append(one) or original(self, one))
    await engine.start()
    for number in range(3):
        await engine.grammars.compile(schema(EXACT))
        await ask(engine, PROMPT, constrained(schema(EXACT)), f"{number}")
    assert compiled == [schema(EXACT)]
    await engine.stop()


async def test_a_grammar_that_takes_too_long_ends_its_own_request_only(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny)
    await engine.start()
    slow, plain = Grammar("regex", "[a-z]{50}"), SamplingParams(max_tokens=40, seed=2, ignore_eos=True)
    alone = await ask(engine, PROMPT, plain, "alone")
    await engine.grammars.compile(slow)
    monkeypatch.setattr(grammar_matcher, "_CREDIT", 0.0)
    monkeypatch.setattr(grammar_matcher, "_SECONDS_PER_TOKEN", 0.0)
    neighbour = asyncio.create_task(ask(engine, PROMPT, plain, "neighbour"))
    with pytest.raises(InvalidRequestError, match="too long"):
        await ask(engine, PROMPT, constrained(slow, n=3), "slow")
    assert (await neighbour).tokens == alone.tokens
    assert engine.stats().used_blocks == 0
    assert engine.is_healthy()
    await engine.stop()


def test_masks_are_computed_while_the_model_computes(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = threading.Event()
    mask, forward = grammar_matcher.GrammarMatcher.mask, Decoder.__call__

    def mask_and_say_so(self: grammar_matcher.GrammarMatcher) -> bytes:
        masked.set()
        return mask(self)

    def forward_that_waits_for_it(*arguments: Any) -> Any:
        assert masked.wait(5)
        masked.clear()
        return forward(*arguments)

    monkeypatch.setattr(grammar_matcher.GrammarMatcher, "mask", mask_and_say_so)
    monkeypatch.setattr(Decoder, "__call__", forward_that_waits_for_it)
    assert answer(tiny, choice("abc")).text[0] == "abc"


def test_the_masks_of_many_rows_are_their_own(tiny: LoadedModel) -> None:
    texts = [f"{number:03}" for number in range(90)]
    answers = generate(tiny, [PROMPT] * 90, [constrained(choice(text)) for text in texts], max_num_seqs=90)
    assert [one.text[0] for one in answers] == texts


def test_the_grammars_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "_CACHED", 2)
    compiler = GrammarCompiler(Tokenizer(byte_tokenizer(), eos_token_ids=frozenset({END})), 320)
    for text in "abaca":
        asyncio.run(compiler.compile(choice(text)))
    assert list(compiler._compiled) == [choice("c"), choice("a")]
    compiler.close()


# Fuzz


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Small, and such that a text which matches has an end."""
    kinds = ["integer", "string", "boolean", "null", "enum", "number", "pattern"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf", "tuple"]
    match rng.choice(kinds):
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
        case "number":
            return {"type": "number", "exclusiveMinimum": -1, "maximum": rng.choice([0, 0.5, 12.25])}
        case "string":
            least = rng.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 5)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-f0-9]{4}$", "^(yes|no)$", "^x?y{1,3}$"])}
        case "enum":
            return {"enum": rng.sample([1, "two", None, 3.5, True, "fünf", "\n", ""], rng.randint(1, 4))}
        case "object":
            names = rng.sample(["a", "b", 'quo"te', "ä", "", "long name"], rng.randint(0, 4))
            properties = {name: random_schema(rng, depth + 1) for name in names}
            required = [name for name in names if rng.random() < 0.6]
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "array":
            least = rng.randint(0, 2)
            items = random_schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}
        case "tuple":
            items = [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
        case kind:
            return {"type": kind}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Like ``tiny``, with a longer context."""
    folder: Path = save(random_model("llama", max_position_embeddings=4096), tmp_path_factory.mktemp("roomy"))
    return load_model(EngineConfig(model=str(folder), dtype="float32"))


def test_answers_to_200_random_schemas_are_valid(roomy: LoadedModel) -> None:
    rng = random.Random(7)
    schemas = [random_schema(rng) for _ in range(200)]
    params = [constrained(schema(one), max_tokens=1500, seed=i) for i, one in enumerate(schemas)]
    params = [replace(one, temperature=0.0) if i % 4 == 0 else one for i, one in enumerate(params)]
    answers = generate(roomy, [PROMPT] * 200, params, max_num_seqs=100)
    cut = 0
    for wanted, one in zip(schemas, answers, strict=True):
        if reasons(one) == ["length"]:
            cut += 1
        else:
            jsonschema.validate(json.loads(one.text[0]), wanted)
    assert cut < 10
