"""The curves of a run as PNG files: the loss large, everything else in small panels. One style; labels in ASCII."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.observe.reference import Band, loss_curve, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#5F6B76"
COMPARE_COLOURS = (GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
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
        """`tokens` when every training record counts them, else `step`."""
        train = self.of_kind("train")
        return "tokens" if train and all("tokens" in record for record in train) else "step"


@dataclass(frozen=True)
class Panel:
    """One small plot: the metric, its title, the axis label with its unit, and a factor to that unit."""

    key: str
    title: str
    unit: str
    scale: float = 1.0
    kind: str = "train"
    from_zero: bool = False


PANELS = (
    Panel("lr", "Learning rate", "learning rate"),
    Panel("grad_norm", "Gradient norm", "L2 norm before clipping"),
    Panel("tokens_per_second", "Throughput", "thousand tokens / s", 1e-3, from_zero=True),
    Panel("mfu", "Model FLOPs utilisation", "% of the matmul peak", 100.0, from_zero=True),
    Panel("valid_bits_per_byte", "Validation", "bits per byte", kind="valid"),
    Panel("memory_gb", "Memory", "GiB", from_zero=True),
    Panel("reward", "Reward", "mean reward"),
    Panel("kl", "KL to the reference", "nats / token"),
    Panel("completion_length", "Answer length", "tokens"),
)


def plot_loss(curve: Curve, path: Path, compare: Sequence[Curve] = ()) -> Path:
    """Training and validation loss of one run, other runs beside it, with ln(vocab) and the reference band."""
    with _style():
        figure, axes = _figure(1, 1, width=8.0, height=4.6)
        _draw_loss(axes[0], curve, compare)
        return _save(figure, path)


def plot_details(curve: Curve, path: Path) -> Path | None:
    """A small panel for every other metric that the run recorded; None (and no file) when there is none."""
    panels = [panel for panel in (*PANELS, *_task_panels(curve)) if _panel_points(curve, panel)[0].size >= 2]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _style():
        figure, axes = _figure(rows, columns, width=4.4 * columns, height=2.6 * rows)
        for axis, panel in zip(axes, panels, strict=False):
            _draw_panel(axis, curve, panel)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        return _save(figure, path)


def plot_stages(curves: Sequence[Curve], path: Path) -> Path:
    """The losses of several stages side by side, each on its own axes."""
    with _style():
        figure, axes = _figure(1, len(curves), width=max(4.8 * len(curves), 6.0), height=4.0)
        for axis, curve in zip(axes, curves, strict=True):
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


def _x_axis(axis: Axes, key: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlabel("tokens" if key == "tokens" else "optimizer step")
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


def _panel_points(curve: Curve, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    x, values = loss_curve(curve.of_kind(panel.kind), panel.key, curve.x_key)
    return x, values * panel.scale


def _draw_panel(axis: Axes, curve: Curve, panel: Panel) -> None:
    x, values = _panel_points(curve, panel)
    marker = "o" if x.size <= 30 else None
    axis.plot(x, values, color=BLUE if panel.kind == "train" else ORANGE, marker=marker, markersize=3.5, linewidth=1.4)
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.set_xlim(left=0)
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    if panel.key == "lr":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _x_axis(axis, curve.x_key)
