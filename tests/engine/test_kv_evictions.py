"""What a selecting policy keeps are the very tokens that the oracle keeps, after every single eviction."""

from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.kv_policies.registry import make_policy
from engine.launch import load_model
from engine.model_runner import ModelRunner
from scheduler.config import SchedulerConfig
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler
from tests.engine.checkpoints import random_model, save
from tests.engine.kv_oracle import Cascade, Oracle, heaviest

TEXT = [
    5,
    9,
    200,
    17,
    31,
    44,
    90,
    12,
    77,
    250,
    61,
    8,
    130,
    99,
    23,
    180,
    54,
    41,
    300,
    66,
    71,
    15,
    208,
    3,
    119,
    28,
    35,
    162,
]
NUM_PROMPT = 11


@pytest.mark.parametrize(
    ("policy", "oracle"),
    [
        (
            {"type": "h2o", "heavy": 4, "recent": 3, "slack": 1, "prompt_slack": 1},
            lambda model: Oracle(model, after=heaviest(4, 3, (1, 1), NUM_PROMPT)),
        ),
        (
            {"type": "spatten", "keep": 8, "keep_last": 5, "sinks": 1, "recent": 2, "slack": 2, "prompt_slack": 1},
            lambda model: Oracle(model, in_all_layers=Cascade((8, 7, 5), (2, 2, 2), (1, 2), NUM_PROMPT, 1, 2)),
        ),
    ],
    ids=["h2o", "spatten"],
)
def test_token_for_token_and_eviction_for_eviction(policy: dict[str, Any], oracle: Any, tmp_path: Any) -> None:
    model = random_model("llama")
    loaded, selector = load_model(EngineConfig(model=str(save(model, tmp_path)), dtype="float32")), make_policy(policy)
    cache = KVCache(loaded.decoder.config, num_blocks=9, block_size=4, dtype=torch.float32, device=torch.device("cpu"))
    runner, expected = ModelRunner(loaded.decoder, cache), oracle(model)
    scheduler = Scheduler(SchedulerConfig(num_blocks=9, block_size=4, max_num_batched_tokens=5))
    stop = StopRule(max_tokens=len(TEXT) - NUM_PROMPT)
    scheduler.add(Request("r", TEXT[:NUM_PROMPT], stop, kv_budget=selector.budget()))
    evictions = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        (item,) = batch.items
        runner.execute(batch, [], {"r": selector})
        if batch.compactions:
            evictions += 1
            (compaction,) = batch.compactions
            expected.run(TEXT[expected.position : item.start])
            places = cache.storage.places(compaction.target, compaction.num_kept)
            kept = cache.storage.positions.view(-1)[places]
            for layer, heads in enumerate(expected.kept):
                for head, entries in enumerate(heads):
                    held = [position for position in kept[layer, head].tolist() if position >= 0]
                    assert held == [entry.position for entry in entries]
        scheduler.update(batch, [[TEXT[item.start + len(item.tokens)]] if item.num_samples else []])
    assert evictions >= 8
