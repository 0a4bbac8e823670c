"""A script for `tests.server.scripted` that says as little as its grammar lets it."""

import numpy as np

from engine.sampler import Sample, SampleRow
from tests.server.scripted import token

END = 257
_PREFERRED = [END, *map(token, '}"]')]


def obedient(row: SampleRow) -> Sample:
    """The end of the text where it may come, else what ends things, else the first token that may come."""
    assert row.matcher is not None
    mask = np.frombuffer(row.matcher.mask(), np.uint8)
    allowed = set(np.unpackbits(mask, bitorder="little").nonzero()[0].tolist())
    chosen = next((one for one in _PREFERRED if one in allowed), min(allowed))
    row.matcher.accept(chosen)
    return Sample(chosen)
