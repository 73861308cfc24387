"""Reference curves: "is my loss right?" answered by the band that a recipe's own runs stayed in.

A band is a JSON file in `minigpt/observe/reference/`: the lowest and the highest smoothed training loss over several
seeds, widened by a margin, on a grid of consumed tokens. `python -m minigpt.observe.reference NAME RUN RUN RUN` records
one; `minigpt report` draws it and says whether a run of that recipe lies inside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.errors import UserError
from minigpt.observe.metrics import read_metrics

REFERENCE_DIR = Path(__file__).parent / "reference"
# Losses fall fast at first and slowly later, so both grid and smoothing are even in the logarithm of the tokens: at
# every point the records within about ±10 % of the tokens count.
SMOOTHING_WIDTH = 0.1
WEIGHT_FLOOR = 1e-6  # so that a line between two far records is well defined
OUTSIDE_ALLOWED = 0.05  # part of the points that may lie outside; the last must not


@dataclass(frozen=True)
class Band:
    """Where the training loss of a recipe is expected.

    Args:
        recipe: Name of the recipe; also the file's name.
        tokens: Consumed tokens, increasing.
        loss_low: Lowest expected smoothed loss (nats a token) at each of them.
        loss_high: Highest expected one.
        runs: From how many runs it was made.
        margin: By how many nats the runs' extremes were widened.
        recorded_on: Hardware and versions of the runs, for the curious.
    """

    recipe: str
    tokens: list[int]
    loss_low: list[float]
    loss_high: list[float]
    runs: int = 1
    margin: float = 0.0
    recorded_on: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BandCheck:
    """Whether a run lies inside a band, and the sentence that says so."""

    inside: bool
    sentence: str


def loss_curve(
    records: Sequence[dict[str, Any]], key: str = "loss", x: str = "tokens"
) -> tuple[np.ndarray, np.ndarray]:
    """(x, values) of the records that have both, as float64 [n] each; NaN losses stay in."""
    points = [
        (record[x], record[key]) for record in records if isinstance(record.get(key), int | float) and x in record
    ]
    values = np.array(points, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def smooth(tokens: np.ndarray, losses: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Losses smoothed at the points `at`: a straight line in log(tokens), fitted around each point. [len(at)]

    A local line, not a local mean: where the loss falls steeply, a mean depends on how often it was logged. `tokens`
    increase; records that are not finite are left out.
    """
    finite = np.isfinite(losses) & (tokens > 0)
    if not finite.any():
        return np.full(len(at), np.nan)
    log_tokens, values = np.log(tokens[finite]), losses[finite]
    return np.array([_smooth_at(log_tokens, values, math.log(point)) for point in at])


def _smooth_at(log_tokens: np.ndarray, values: np.ndarray, log_point: float) -> float:
    """Weighted least squares over the records within four widths and the next on either side, taken at the point."""
    reach = 4 * SMOOTHING_WIDTH
    start, stop = np.searchsorted(log_tokens, (log_point - reach, log_point + reach))
    near = slice(max(start - 1, 0), stop + 1)
    x, y = log_tokens[near] - log_point, values[near]
    weights = np.exp(-0.5 * (x / SMOOTHING_WIDTH) ** 2) + WEIGHT_FLOOR
    x_mean, y_mean = np.average(x, weights=weights), np.average(y, weights=weights)
    spread = float(weights @ (x - x_mean) ** 2)
    slope = float(weights @ ((x - x_mean) * (y - y_mean))) / spread if spread > 0 else 0.0
    return float(y_mean - slope * x_mean)


def make_band(runs: Sequence[Path], *, recipe: str, margin: float = 0.1, points: int = 40) -> Band:
    """The band of several runs of one recipe, usually different seeds.

    Args:
        runs: Run folders or their `metrics.jsonl`.
        recipe: The recipe's name.
        margin: Nats added above and below the extremes, for other machines and versions.
        points: Grid points.

    Raises UserError when a run has no training losses with token counts.
    """
    curves = [_training_curve(Path(run)) for run in runs]
    if not curves:
        raise UserError(f"no runs given to make the reference band {recipe!r} from; name at least one run folder")
    first, last = max(tokens[0] for tokens, _ in curves), min(tokens[-1] for tokens, _ in curves)
    if first >= last:
        raise UserError(f"the runs of the band {recipe!r} have no tokens in common; record it from runs of one recipe")
    grid = np.geomspace(first, last, points)
    smoothed = np.stack([smooth(tokens, losses, grid) for tokens, losses in curves])
    if not np.isfinite(smoothed).all():
        raise UserError(f"a run of the band {recipe!r} has no finite loss; record it from runs that trained well")
    return Band(
        recipe=recipe,
        tokens=[round(value) for value in grid],
        loss_low=[round(float(value), 4) for value in smoothed.min(axis=0) - margin],
        loss_high=[round(float(value), 4) for value in smoothed.max(axis=0) + margin],
        runs=len(curves),
        margin=margin,
    )


def _training_curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    if not run.exists():
        raise UserError(f"{run} does not exist; give a run folder or its metrics.jsonl")
    records = [record for record in read_metrics(run) if record.get("kind", "train") == "train"]
    tokens, losses = loss_curve(records)
    if len(tokens) < 2:
        raise UserError(f"{run} has fewer than two training losses with token counts; train it further")
    return tokens, losses


def save_band(band: Band, folder: Path = REFERENCE_DIR) -> Path:
    """Write the band as `folder/RECIPE.json` and return that path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{band.recipe}.json"
    path.write_text(json.dumps(asdict(band), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def load_band(recipe: str, folder: Path = REFERENCE_DIR) -> Band | None:
    """The band of a recipe, or None when none was recorded."""
    path = folder / f"{recipe}.json"
    if not path.is_file():
        return None
    return Band(**json.loads(path.read_text(encoding="utf-8")))


def check_against(run: Path, band: Band) -> BandCheck:
    """Say in one sentence whether the run's smoothed training loss lies inside the band, as far as both reach."""
    try:
        tokens, losses = _training_curve(Path(run))
    except UserError as error:
        return BandCheck(False, f"Not compared with the reference band of {band.recipe}: {error}.")
    grid = np.array(band.tokens, dtype=np.float64)
    reached = (grid >= tokens[0] * 0.999) & (grid <= tokens[-1] * 1.001)
    if not reached.any():
        return BandCheck(False, f"Too short to compare with the reference band of {band.recipe}.")
    grid, low, high = grid[reached], np.array(band.loss_low)[reached], np.array(band.loss_high)[reached]
    smoothed = smooth(tokens, losses, grid)
    inside = (smoothed >= low) & (smoothed <= high)  # NaN is outside
    if not np.isfinite(losses).all():
        return BandCheck(False, f"Outside the reference band of {band.recipe}: the loss is not a number at some steps.")
    if inside.mean() >= 1 - OUTSIDE_ALLOWED and inside[-1]:
        return BandCheck(True, f"Inside the reference band of {band.recipe} up to {_short(grid[-1])} tokens.")
    worst = int(np.flatnonzero(~inside)[-1])
    return BandCheck(False, _outside_sentence(band, grid[worst], smoothed[worst], low[worst], high[worst]))


def _outside_sentence(band: Band, tokens: float, loss: float, low: float, high: float) -> str:
    cause = (
        "higher than expected: look at the learning rate, the data and the batch size"
        if loss > high
        else "lower than expected: another recipe, easier data, or labels that the model can see"
    )
    where = f"{loss:.2f} at {_short(tokens)} tokens, expected {low:.2f} to {high:.2f}"
    return f"Outside the reference band of {band.recipe} ({where}), {cause}."


def _short(tokens: float) -> str:
    """`1234567` → `1.2M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.1f}{letter}"
    return f"{tokens:.0f}"


def record(recipe: str, runs: list[Path], margin: float = 0.1, output: Path = REFERENCE_DIR) -> None:
    """Record the reference band of a recipe from finished runs of it.

    Args:
        recipe: The recipe's name.
        runs: Run folders, usually the same recipe with different seeds.
        margin: Nats added above and below.
        output: Folder to write RECIPE.json into.
    """
    from minigpt.observe.hardware import describe_hardware, summarise_hardware

    band = make_band(runs, recipe=recipe, margin=margin)
    hardware = describe_hardware()
    band.recorded_on.update(hardware=summarise_hardware(hardware), torch=hardware["torch"])
    path = save_band(band, output)
    width = math.fsum(h - l for l, h in zip(band.loss_low, band.loss_high, strict=True)) / len(band.tokens)
    print(f"{path}: {band.runs} runs, {_short(band.tokens[-1])} tokens, on average {width:.2f} nats wide")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(record)
