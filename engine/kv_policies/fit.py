"""Whether a model can be run under a KV budget."""

from engine.engine_info import EngineInfo
from scheduler.kv_budget import KVBudget, Selection


def budget_refusal(budget: KVBudget, info: EngineInfo) -> str | None:
    """Why a request with this budget cannot be served, in words for its client; None if it can."""
    if isinstance(budget, Selection):
        kept = budget.slots
        if info.windowed:
            return "this model's layers have sliding windows of their own: a policy cannot select tokens for them"
    else:
        kept = budget.window + budget.sinks
        if budget.sinks and info.position_dependent_rotation:
            return "this model's rotation changes with the position (dynamic NTK scaling): sinks cannot keep theirs"
    if kept > info.max_model_len:
        return f"the KV policy keeps {kept} tokens, more than the model's context length, {info.max_model_len}"
    return None
