"""A slow, literal float64 version of the paper's formulas and of the published code's way of
counting valleys.

Nothing here shares code with the fast version; the tests compare the two step by step.
"""

import numpy as np


def matrix_cosine(weight, down, up):
    """cos of W and B A, both formed and flattened; 0 where one of them is zero."""
    w, a, b = (np.asarray(matrix, dtype=np.float64).reshape(len(matrix), -1) for matrix in (weight, down, up))
    delta = b @ a
    norm = np.linalg.norm(w) * np.linalg.norm(delta)
    return float((w * delta).sum() / norm) if norm > 0 else 0.0


def row_cosine(weight, down, up):
    """Mean over rows of cos(W[i], (BA)[i]); a row without direction counts as 0."""
    w, a, b = (np.asarray(matrix, dtype=np.float64).reshape(len(matrix), -1) for matrix in (weight, down, up))
    delta = b @ a
    cosines = []
    for w_row, delta_row in zip(w, delta):
        norm = np.linalg.norm(w_row) * np.linalg.norm(delta_row)
        cosines.append(w_row @ delta_row / norm if norm > 0 else 0.0)
    return float(np.mean(cosines))


def fluctuation_series(cs, window):
    """(MA, X, F) of a whole CS series: arrays that start where each quantity first exists."""
    cs = np.asarray(cs, dtype=np.float64)
    means = np.array([cs[k - window + 1 : k + 1].mean() for k in range(window - 1, len(cs))])
    differences = np.array([means[k] - means[k - 1] for k in range(1, len(means))])
    mean_differences = np.array(
        [differences[k - window + 1 : k + 1].mean() for k in range(window - 1, len(differences))]
    )
    fluctuation = np.array(
        [np.var(mean_differences[k - window + 1 : k + 1]) for k in range(window - 1, len(mean_differences))]
    )
    return means, mean_differences, fluctuation


def published_stop(cs, window):
    """(index of detection, index of the turning point) by rescanning F at every measurement, or
    (None, None)."""
    carried = 0.0
    for k in range(len(cs)):
        fluctuation = fluctuation_series(cs[: k + 1], window)[2]
        valleys = 0
        for i in range(1, len(fluctuation)):
            derivative = fluctuation[i] - fluctuation[i - 1]
            if carried < 0 < derivative:
                valleys += 1
            carried = derivative
            if valleys == 2:
                return k, k - (3 * window - 2)
    return None, None


def literal_stop(cs, window, valley):
    """The same without the carried derivative: one scan, the N-th valley."""
    fluctuation = fluctuation_series(cs, window)[2]
    derivatives = np.diff(fluctuation)
    valleys = [i for i in range(1, len(derivatives)) if derivatives[i - 1] < 0 < derivatives[i]]
    if len(valleys) < valley:
        return None, None
    k = valleys[valley - 1] + 1 + 3 * window - 2
    return k, k - (3 * window - 2)
