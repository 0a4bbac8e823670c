"""Embeddings as clients ask for them, and as they are written."""

import base64
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from engine.errors import InvalidRequestError
from engine.sampling_params import Pooling
from server.body import QueuedBody
from server.protocol import Prompt

if TYPE_CHECKING:
    from engine.request_state import Vector


class EmbeddingRequest(QueuedBody):
    """POST /v1/embeddings."""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None

    def check_dimensions(self, size: int) -> None:
        """Raise InvalidRequestError unless embeddings of ``size`` numbers are what is asked for.

        Only what a model was trained to (Matryoshka representations, Kusupati et al. 2022) may be cut short: in the
        states of one that was not, no number matters less than another.
        """
        if self.dimensions not in (None, size):
            raise InvalidRequestError(
                f"dimensions: this model's embeddings have {size} numbers, and it was not trained for them to be cut",
                param="dimensions",
            )


def written(vector: "Vector", *, normalize: bool, encoding: Literal["float", "base64"]) -> str:
    """A vector [hidden] as JSON: its numbers, or the text of its float32s in little-endian order.

    Its length becomes 1 if ``normalize``, unless it is 0. Either way the same float32s are read back.
    """
    values = vector
    if normalize and (length := np.linalg.norm(vector.astype(np.float64))):
        values = (vector / length).astype(np.float32)
    if encoding == "base64":
        return f'"{base64.b64encode(values.astype("<f4").tobytes()).decode()}"'
    return f"[{','.join(map('{:.9g}'.format, values.tolist()))}]"  # nine digits tell every float32
