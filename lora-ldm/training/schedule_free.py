"""Schedule-free optimizers: their averaged weights, for measuring and saving."""

import contextlib


def is_schedule_free(optimizer):
    """Schedule-free optimizers hold averaged weights, shown between eval() and train()."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@contextlib.contextmanager
def averaged_weights(optimizer):
    """Within it the parameters are those to use and to save; for ordinary optimizers they always are."""
    if is_schedule_free(optimizer):
        optimizer.eval()
    yield
    if is_schedule_free(optimizer):
        optimizer.train()
