"""The curves of a run as PNG files: the loss (or the reward) large, everything else in small panels.

One style; labels in ASCII.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.observe.reference import SMOOTHING_WIDTH, Band, loss_curve, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#5F6B76"
COMPARE_COLOURS = (GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
VALUE_TEXT: dict[str, Any] = {"textcoords": "offset points", "color": ORANGE, "fontsize": 9, "fontweight": "bold"}
PHASE_COLOURS = (BLUE, *COMPARE_COLOURS[:4], ORANGE, "#F0E442", GREY)
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA5B1",
    "axes.labelcolor": "#323F4B",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#323F4B",
    "ytick.color": "#323F4B",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.dpi": 120,
}


@dataclass(frozen=True)
class Curve:
    """A run as the plots see it.

    Args:
        name: For legends.
        records: The records of its `metrics.jsonl`.
        vocab_size: For the line at ln(vocab_size), the loss of guessing uniformly, under a run that starts from
            nothing; None leaves it out.
        band: Reference band to draw under the loss.
    """

    name: str
    records: Sequence[dict[str, Any]]
    vocab_size: int | None = None
    band: Band | None = None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("kind", "train") == kind]

    @property
    def x_key(self) -> str:
        """`tokens` when every training record counts them, else `step`; `step` where answers are sampled."""
        train = self.of_kind("train")
        counted = train and not self.is_rl and all("tokens" in record for record in train)
        return "tokens" if counted else "step"

    @property
    def is_rl(self) -> bool:
        """Whether it learns from rewards: its policy loss is about 0 throughout and says nothing."""
        return any("reward" in record for record in self.of_kind("train"))


@dataclass(frozen=True)
class Panel:
    """One small plot: the metric, its title, the axis label with its unit, and a factor to that unit.

    `lines` are further metrics in the same plot; with them every line has its label, `labels`, the first one's first.
    """

    key: str
    title: str
    unit: str
    scale: float = 1.0
    kind: str = "train"
    from_zero: bool = False
    lines: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


PANELS = (
    Panel("lr", "Learning rate", "learning rate"),
    Panel("grad_norm", "Gradient norm", "L2 norm before clipping"),
    Panel("tokens_per_second", "Throughput", "thousand tokens / s", 1e-3, from_zero=True),
    Panel("mfu", "Model FLOPs utilisation", "% of the matmul peak", 100.0, from_zero=True),
    Panel("valid_bits_per_byte", "Validation", "bits per byte", kind="valid"),
    Panel("memory_gb", "Memory", "GiB", from_zero=True),
)
RL_PANELS = (
    Panel("reward_model", "Reward model", "mean score"),
    Panel("kl", "KL to the reference", "nats / token"),
    Panel("kl_coefficient", "KL coefficient", "coefficient"),
    Panel("entropy", "Entropy", "nats / token", from_zero=True),
    Panel("clip_fraction", "Clipped tokens", "%", 100.0, from_zero=True),
    Panel(
        *("response_length", "Answer length", "tokens"),
        from_zero=True,
        lines=("response_length_max",),
        labels=("mean", "longest"),
    ),
    Panel("truncated", "Answers cut off at the limit", "%", 100.0, from_zero=True),
    Panel("zero_variance_groups", "Groups of equal rewards", "%", 100.0, from_zero=True),
    Panel("sampler_gap_mean", "Sampler against policy: mean", "log-prob difference"),
    Panel("sampler_gap_max", "Sampler against policy: largest", "log-prob difference", from_zero=True),
    Panel("version_lag", "Age of the answers", "updates", from_zero=True),
    Panel("explained_variance", "Explained variance", "fraction"),
    Panel("value_loss", "Value loss", "squared error", from_zero=True),
    Panel("grad_norm", "Gradient norm", "L2 norm before clipping", from_zero=True),
    Panel("lr", "Learning rate", "learning rate", from_zero=True),
    Panel(
        *("generated_tokens_per_second", "Throughput", "thousand tokens / s", 1e-3),
        from_zero=True,
        lines=("tokens_per_second",),
        labels=("while generating", "of the whole step"),
    ),
)


def plot_loss(curve: Curve, path: Path, compare: Sequence[Curve] = ()) -> Path:
    """Training and validation loss of one run, other runs beside it, with ln(vocab) and the reference band."""
    with _style():
        figure, axes = _figure(1, 1, width=8.0, height=4.6)
        _draw_loss(axes[0], curve, compare)
        return _save(figure, path)


def plot_reward(curve: Curve, path: Path, compare: Sequence[Curve] = ()) -> Path:
    """Training reward, raw and smoothed, and the held-out one as points; beside it accuracy if it differs."""
    scores = _scores(curve)
    with _style():
        figure, axes = _figure(1, len(scores), width=8.0 if len(scores) == 1 else 11.0, height=4.6)
        for axis, score in zip(axes, scores, strict=True):
            _draw_score(axis, curve, score, compare)
        return _save(figure, path)


def plot_details(curve: Curve, path: Path) -> Path | None:
    """A small panel for every other metric that the run recorded; None (and no file) when there is none."""
    panels = _panels_of(curve)
    phases = phase_seconds(curve)
    drawn = len(panels) + bool(phases)
    if not drawn:
        return None
    columns = min(3 if curve.is_rl else 2, drawn)
    rows = math.ceil(drawn / columns)
    with _style():
        figure, axes = _figure(rows, columns, width=4.4 * columns, height=2.6 * rows)
        for axis, panel in zip(axes, panels, strict=False):
            _draw_panel(axis, curve, panel)
        if phases:
            _draw_phases(axes[len(panels)], curve, phases)
        for axis in axes[drawn:]:
            axis.set_axis_off()
        return _save(figure, path)


def plot_stages(curves: Sequence[Curve], path: Path) -> Path:
    """The losses of several stages, each on its own axes; of a stage of rewards what it scores."""
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    with _style():
        figure, axes = _figure(rows, columns, width=max(4.8 * columns, 6.0), height=4.0 * rows)
        for axis in axes[len(curves) :]:
            axis.set_axis_off()
        for axis, curve in zip(axes, curves, strict=False):
            if curve.is_rl:
                _draw_score(axis, curve, _scores(curve)[-1], ())
            else:
                _draw_loss(axis, curve, ())
            axis.set_title(curve.name)
        return _save(figure, path)


def _style() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _x_axis(axis: Axes, key: str, steps: str = "optimizer step") -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlabel("tokens" if key == "tokens" else steps)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if key == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_loss(axis: Axes, curve: Curve, compare: Sequence[Curve]) -> None:
    key = curve.x_key
    shown: list[np.ndarray] = []
    if curve.band is not None and key == "tokens":
        band = curve.band
        label = f"reference band ({band.recipe})"
        axis.fill_between(
            band.tokens, band.loss_low, band.loss_high, color=ORANGE, alpha=0.22, linewidth=0, label=label
        )
        shown.append(np.array(band.loss_low))
    x, losses = loss_curve(curve.of_kind("train"), x=key)
    shown.append(losses)
    axis.plot(x, losses, color=BLUE, alpha=0.4, linewidth=0.8)
    _draw_smoothed(axis, x, losses, BLUE, "training")
    valid_x, valid_losses = loss_curve(curve.of_kind("valid"), "valid_loss", key)
    if valid_x.size:
        shown.append(valid_losses)
        axis.plot(valid_x, valid_losses, color=ORANGE, marker="o", markersize=4, label="validation")
    for other, colour in zip(compare, COMPARE_COLOURS, strict=False):
        other_x, other_losses = loss_curve(other.of_kind("train"), x=key)
        shown.append(other_losses)
        _draw_smoothed(axis, other_x, other_losses, colour, other.name)
    uniform = math.log(curve.vocab_size) if curve.vocab_size and _starts_from_nothing(curve) else None
    if uniform is not None:
        _draw_uniform_guess(axis, uniform, f"ln({curve.vocab_size}) = {uniform:.2f}: a uniform guess")
    _loss_limits(axis, shown, uniform)
    axis.set_ylabel("loss (nats / token)")
    axis.set_title("Loss")
    _x_axis(axis, key)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper right", bbox_to_anchor=(1.0, 0.9))  # under the line at ln(vocab)


def _draw_smoothed(axis: Axes, x: np.ndarray, losses: np.ndarray, colour: str, label: str) -> None:
    if not x.size:
        return
    at = np.unique(np.linspace(max(x[0], 1.0), max(x[-1], 1.0), 400))
    axis.plot(at, smooth(x, losses, at), color=colour, label=label)


def _starts_from_nothing(curve: Curve) -> bool:
    """Whether the first loss is that of an untrained model, not of one that was loaded."""
    losses = loss_curve(curve.of_kind("train"), x="step")[1]
    return bool(losses.size and curve.vocab_size and losses[0] > 0.7 * math.log(curve.vocab_size))


def _draw_uniform_guess(axis: Axes, uniform: float, text: str) -> None:
    """A line and a mark at step 0 where a model that knows nothing must start."""
    axis.axhline(uniform, color=GREY, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    axis.plot([0], [uniform], marker="D", markersize=5, color=GREY, clip_on=False, zorder=3)
    axis.annotate(text, (0, uniform), (6, 4), textcoords="offset points", color=GREY, fontsize=8.5, va="bottom")


def _scores(curve: Curve) -> list[Panel]:
    """What says how well it goes, the best measure last: reward, and accuracy where one is measured.

    With accuracy as the only reward the two are one.
    """
    records = [record for record in curve.records if "reward" in record]
    if not any("accuracy" in record for record in records):
        return [Panel("reward", "Reward", "mean reward")]
    accuracy = Panel("accuracy", "Accuracy", "right answers (%)", 100.0)
    if all(math.isclose(record.get("accuracy", math.nan), record["reward"], abs_tol=1e-6) for record in records):
        return [accuracy]
    return [Panel("reward", "Reward", "mean reward"), accuracy]


def _draw_score(axis: Axes, curve: Curve, score: Panel, compare: Sequence[Curve]) -> None:
    x, values = _points(curve, score.key, score.scale, "train")
    axis.plot(x, values, color=BLUE, alpha=0.35, linewidth=0.8)
    _draw_evenly_smoothed(axis, x, values, BLUE, "training, sampled")
    heldout_x, heldout = _points(curve, score.key, score.scale, "eval")
    if heldout_x.size:
        axis.plot(heldout_x, heldout, color=ORANGE, marker="o", markersize=6, label="held out, greedy", zorder=3)
        for at, offset, side in ((0, (7, -14), "left"), (-1, (2, 9), "right"))[: heldout_x.size]:
            text = f"{heldout[at]:.1f} %" if score.scale == 100 else f"{heldout[at]:.3g}"
            axis.annotate(text, (heldout_x[at], heldout[at]), offset, **VALUE_TEXT, ha=side)
    for other, colour in zip(compare, COMPARE_COLOURS, strict=False):
        _draw_evenly_smoothed(axis, *_points(other, score.key, score.scale, "train"), colour, other.name)
    if score.scale == 100:
        axis.set_ylim(-9, 109)  # room for the values beside the points
    axis.set_xlim(left=0)
    axis.set_ylabel(score.unit)
    axis.set_title(score.title)
    _x_axis(axis, curve.x_key, "step")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best")


def _draw_evenly_smoothed(axis: Axes, x: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Smoothed over about ±5 % of the run everywhere: rewards are as noisy late as early.

    `smooth` is even in the logarithm, so it gets the exponential of the steps.
    """
    if not x.size:
        return
    scale = 20 * SMOOTHING_WIDTH / max(x[-1], 1.0)
    at = np.linspace(x[0], x[-1], 200)
    axis.plot(at, smooth(np.exp(scale * x), values, np.exp(scale * at)), color=colour, label=label)


def _loss_limits(axis: Axes, shown: Sequence[np.ndarray], uniform: float | None) -> None:
    """From just under the lowest loss to just over ln(vocab); a spike far above does not flatten the rest."""
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if not values.size:
        return
    bottom, top = float(values.min()), float(values.max())
    if uniform is not None:
        top = max(uniform, min(top, 1.5 * uniform))
    margin = 0.09 * (top - bottom) or 0.1
    axis.set_ylim(max(bottom - margin, 0.0) if bottom >= 0 else bottom - margin, top + margin)
    axis.set_xlim(left=0)


def _task_panels(curve: Curve) -> list[Panel]:
    """A panel for the first metric of each task that was run during training (`task/metric`)."""
    panels: dict[str, Panel] = {}
    for record in curve.of_kind("eval"):
        for key in record:
            task, slash, metric = key.rpartition("/")
            if slash and task not in panels:
                share = metric.startswith(("acc", "pass@"))
                title = task.encode("ascii", "replace").decode()
                unit, scale = (f"{metric} (%)", 100.0) if share else (metric.replace("_", " "), 1.0)
                panels[task] = Panel(key, title, unit, scale, kind="eval", from_zero=share)
    return list(panels.values())


def _panels_of(curve: Curve) -> list[Panel]:
    """The panels with something to see: two points, and in a run of rewards not 0 throughout."""
    if not curve.is_rl:
        return [p for p in (*PANELS, *_task_panels(curve)) if _points(curve, p.key, p.scale, p.kind)[0].size >= 2]
    panels = [panel for panel in (*_reward_parts(curve), *RL_PANELS) if _points(curve, panel.key)[0].size >= 2]
    return [panel for panel in panels if panel.title not in always_zero(curve)]


def always_zero(curve: Curve) -> list[str]:
    """Titles of the panels of a run of rewards that are left out, since the metric was 0 at every step."""
    values = {panel.title: _points(curve, panel.key)[1] for panel in RL_PANELS}
    return [title for title, found in values.items() if found.size and not found.any()]


def _reward_parts(curve: Curve) -> list[Panel]:
    """The rewards that a weighted sum is made of, in one panel."""
    apart = ("reward_std", "reward_failures", "reward_model")
    names = dict.fromkeys(
        key for record in curve.of_kind("train") for key in record if key.startswith("reward_") and key not in apart
    )
    if not names:
        return []
    first, *others = names
    labels = tuple(name.removeprefix("reward_").replace("_", " ").encode("ascii", "replace").decode() for name in names)
    return [Panel(first, "Parts of the reward", "mean reward", lines=tuple(others), labels=labels)]


def phase_seconds(curve: Curve) -> dict[str, np.ndarray]:
    """Seconds of each phase of each training step, `other` (what no phase counts) last; empty if none was recorded.

    Returns name → float64 [records that have `seconds_step`].
    """
    records = [record for record in curve.of_kind("train") if "seconds_step" in record]
    names = dict.fromkeys(key for record in records for key in record if key.startswith("seconds_"))
    names.pop("seconds_step", None)
    if not names:
        return {}
    found = {
        name.removeprefix("seconds_").replace("_", " "): np.array([record.get(name, 0.0) for record in records])
        for name in names
    }
    total = np.array([record["seconds_step"] for record in records])
    return {**found, "other": np.maximum(total - np.sum(list(found.values()), axis=0), 0.0)}


def _draw_phases(axis: Axes, curve: Curve, phases: dict[str, np.ndarray]) -> None:
    x = loss_curve(curve.of_kind("train"), "seconds_step", "step")[0]
    axis.stackplot(x, *phases.values(), labels=list(phases), colors=PHASE_COLOURS, linewidth=0)
    total = np.sum(list(phases.values()), axis=0)
    later = total[1:] if total.size > 1 else total  # the first step compiles
    axis.set_ylim(0, 1.7 * float(np.quantile(later, 0.95)))
    axis.set_xlim(left=0)
    axis.set_title("Time of a step")
    axis.set_ylabel("seconds")
    axis.legend(ncols=3, fontsize=7.5, loc="upper right", handlelength=1.0, columnspacing=1.0)
    _x_axis(axis, "step", "step")


def _points(curve: Curve, key: str, scale: float = 1.0, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
    x, values = loss_curve(curve.of_kind(kind), key, curve.x_key)
    return x, values * scale


def _draw_panel(axis: Axes, curve: Curve, panel: Panel) -> None:
    colours = (BLUE if panel.kind == "train" else ORANGE, *COMPARE_COLOURS)
    for index, key in enumerate((panel.key, *panel.lines)):
        x, values = _points(curve, key, panel.scale, panel.kind)
        label = panel.labels[index] if panel.lines else None
        colour = colours[index % len(colours)]
        marker = "o" if x.size <= 30 else None
        axis.plot(x, values, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=label)
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.set_xlim(left=0)
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    if panel.lines:
        axis.legend(fontsize=8)
    if panel.key == "lr":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _x_axis(axis, curve.x_key, "step" if curve.is_rl else "optimizer step")
