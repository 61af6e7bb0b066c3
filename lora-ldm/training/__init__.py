"""One training run: set-up, loop, loss, optimizers, state, previews and results."""
