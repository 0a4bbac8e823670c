"""Whether a model can be run under a KV budget, and what its own sliding windows make of it."""

from collections.abc import Sequence

from engine.engine_info import EngineInfo
from scheduler.kv_budget import KVBudget, Selection, Window


def budget_refusal(budget: KVBudget, info: EngineInfo) -> str | None:
    """Why a request with this budget cannot be served, in words for its client; None if it can."""
    own = [window for window in info.windows if window is not None]
    if isinstance(budget, Selection):
        kept = budget.slots
        if own:
            return "this model's layers have sliding windows of their own: a policy cannot select tokens for them"
    else:
        kept = budget.window + budget.sinks
        if budget.sinks and info.position_dependent_rotation:
            return "this model's rotation changes with the position (dynamic NTK scaling): sinks cannot keep theirs"
        if budget.sinks and own and kept > min(own):
            return (
                f"this model has layers that see {min(own)} tokens: sinks would be farther away than they were trained "
                f"for, so sinks and window together can be at most that, not {kept}"
            )
    if kept > info.max_model_len:
        return f"the KV policy keeps {kept} tokens, more than the model's context length, {info.max_model_len}"
    return None


def fitted(budget: KVBudget | None, windows: Sequence[int | None]) -> KVBudget | None:
    """What a request with this budget holds on a model whose layers have these windows (None: they see everything).

    Where no layer sees further than a window, what has left the widest of them is seen by no later token under any
    policy. One layer that sees everything needs all: a block table serves all layers.
    """
    own = [window for window in windows if window is not None]
    if not own or len(own) < len(windows):
        return budget
    widest = Window(window=max(own), own=True)
    if budget is None or (isinstance(budget, Window) and not budget.sinks and budget.window >= widest.window):
        return widest
    return budget
