"""Keeping less from layer to layer."""


def narrowing(first: int, last: int, num_layers: int, untouched: float = 0.0) -> list[int]:
    """A number for each layer: ``first`` in the first one and in the share that is ``untouched``, then evenly less."""
    begin = max(int(untouched * num_layers), 1)
    steps = max(num_layers - begin, 1)
    return [first - (first - last) * max(layer + 1 - begin, 0) // steps for layer in range(num_layers)]
