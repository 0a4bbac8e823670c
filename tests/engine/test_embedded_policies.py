"""KV policies on the embedded model: its logits are the oracle's there too, token by token.

A float64 pass over one token takes a tenth of a second, so few policies and tokens are tried here; all policies are in
`test_kv_policies.py`, on a tiny model.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from engine.kv_policies.spatten import SpAtten
from engine.launch import LoadedModel
from tests.engine.driving import GREEDY, generate
from tests.engine.kv_oracle import Cascade, Oracle
from tests.engine.test_kv_policies import POLICIES

PROMPT = "The old man saw his sea, with a boy who could not"
"""No token comes twice: see `test_kv_policies.PARAMS`."""
PARAMS = dataclasses.replace(GREEDY, max_tokens=8, logprobs=50, repetition_penalty=100.0)


NARROWING = [12] * 4 + [12 - 4 * layer // 26 for layer in range(1, 27)]
"""Of 30 layers the first 15% keep 12 tokens, the last keeps 8."""
HEADS = [3] * 9 + [3 - layer // 21 for layer in range(1, 22)]
"""Of their 3 KV heads the first 30% keep all, the last keeps 2."""
CASES = {
    **{name: POLICIES[name] for name in ("streaming", "h2o")},
    "spatten": (
        SpAtten(keep=12, keep_last=8, sinks=1, recent=2, slack=2, prompt_slack=3, heads=0.6),
        lambda model, prompt: Oracle(model, in_all_layers=Cascade(NARROWING, HEADS, (3, 2), prompt, 1, 2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_oracles(embedded: LoadedModel, oracle: Any, name: str) -> None:
    policy, make_oracle = CASES[name]
    prompt = embedded.checkpoint.tokenizer.encode(PROMPT)
    (answer,) = generate(embedded, [prompt], PARAMS, kv_policy=policy, block_size=4, max_num_batched_tokens=7)
    assert answer.evicted_tokens > 0
    logits = make_oracle(copy.deepcopy(oracle), len(prompt)).run([*prompt, *answer.tokens[0][:-1]])
    for output, expected in zip(answer.outputs, logits[len(prompt) - 1 :].log_softmax(-1), strict=True):
        tokens, likelihoods = zip(*output.logprobs[0].top, strict=True)
        torch.testing.assert_close(
            torch.tensor(likelihoods, dtype=torch.float64), expected[list(tokens)], rtol=0, atol=1e-4
        )
