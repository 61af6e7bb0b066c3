"""The worst five runs of each rule as pictures: the held-out curve, the kept step, and the best
one."""

import textwrap

from matplotlib.figure import Figure

WORST = 5
ROW_INCHES, COLUMN_INCHES = 1.6, 2.6
NAME_WIDTH = 24  # letters of a rule's name in a line


def draw_worst(path, rows):
    """One row of axes a rule, one run an axis, worst first. rows: [(name, traces, their
    Outcomes)]."""
    figure = Figure(figsize=(WORST * COLUMN_INCHES, len(rows) * ROW_INCHES), layout="constrained")
    axes = figure.subplots(len(rows), WORST, squeeze=False)
    for row, (name, traces, result) in zip(axes, rows):
        order = result.regret.argsort()[::-1][:WORST]
        row[0].set_ylabel(textwrap.fill(name.replace("**", ""), NAME_WIDTH), fontsize=7)
        for axis, index in zip(row, order):
            trace = traces[index]
            axis.plot(trace.steps / trace.per_epoch, trace.losses, color="#c8553d", linewidth=1)
            axis.axvline(result.best_epoch[index], color="#2a7f62", linewidth=1)
            axis.axvline(result.kept_epoch[index], color="black", linestyle="--", linewidth=1)
            axis.set_title(f"{trace.spec.name.split('-', 1)[1]}: {result.regret[index]:.2f}", fontsize=7)
            axis.tick_params(labelsize=6)
        for axis in row[len(order) :]:
            axis.axis("off")
    figure.suptitle("held-out loss by epoch; green: lowest, dashed: kept; the number is the regret", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
