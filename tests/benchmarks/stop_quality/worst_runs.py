"""The worst five runs of each rule as pictures: the held-out curve, the kept step, and the best one."""

from matplotlib.figure import Figure

WORST = 5
ROW_INCHES, COLUMN_INCHES = 1.5, 2.6


def draw_worst(path, traces, results):
    """One row of axes a rule, one run an axis, worst first. results: [(Contestant, Outcomes)]; nulls are left out."""
    shown = [(one, result) for one, result in results if not one.is_null]
    figure = Figure(figsize=(WORST * COLUMN_INCHES, len(shown) * ROW_INCHES), layout="constrained")
    axes = figure.subplots(len(shown), WORST, squeeze=False)
    for row, (one, result) in zip(axes, shown):
        order = result.regret.argsort()[::-1][:WORST]
        row[0].set_ylabel(one.name.replace("**", ""), fontsize=6)
        for axis, index in zip(row, order):
            trace = traces[index]
            axis.plot(trace.steps / trace.per_epoch, trace.losses, color="#c8553d", linewidth=1)
            axis.axvline(result.best_epoch[index], color="#2a7f62", linewidth=1)
            axis.axvline(result.kept_epoch[index], color="black", linestyle="--", linewidth=1)
            axis.set_title(f"{trace.spec.name.split('-', 1)[1]}: {result.regret[index]:.2f}", fontsize=6)
            axis.tick_params(labelsize=5)
        for axis in row[len(order) :]:
            axis.axis("off")
    figure.suptitle("held-out loss by epoch; green: lowest, dashed: kept; the number is the regret", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
