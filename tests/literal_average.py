"""The average of saved weights as DESIGN.md writes it, one step after the other: the slow twin of
es_lora/average.py."""


def literal_average(steps, width):
    """steps: [{name: tensor}] of every optimizer step, from the first on. -> {name: float64}."""
    average = {name: tensor.double() * 0 for name, tensor in steps[0].items()}
    for t, weights in enumerate(steps, start=1):
        beta = (1 - 1 / t) ** (1 / width - 1)
        average = {name: beta * average[name] + (1 - beta) * tensor.double() for name, tensor in weights.items()}
    return average


def is_average(tensors, steps, width, tolerance=1e-5):
    """Whether {name: tensor} is the average of these steps, up to float32's rounding."""
    expected = literal_average(steps, width)
    return tensors.keys() == expected.keys() and all(
        (tensors[name].double() - expected[name]).abs().max() < tolerance for name in tensors
    )
