"""What more data or another size would give, from a run's own points, as estimates with intervals; "unknown" where they say too
little.

The loss over tokens D is fitted by L = E + A·D^-alpha (Hestness et al., arXiv:1712.00409). For each alpha of a grid E and A
are linear least squares with E, A >= 0. An interval is the profile likelihood: every value that some alpha, E and A give whose
sum of squares is not worse than the best one's by the 95 % point of Student's t. Residuals that resemble their neighbours count
as fewer points. It is the curve of this run under its schedule: decay lowers the end, so what is extrapolated is a longer run
with the schedule stretched.

The size enters by published fits only: one run has one size.

Shapes: N points, G values of alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ..config.counts import parameter_counts
from ..config.schema import Config, ConfigError, DeepSeekConfig
from ..config.steps import LEAST_POINTS, LEAST_SPAN
from .curves import History

RANGE = 32.0  # points below D_max / RANGE are the beginning, which follows no power law
BINS = 48  # of training losses, equal in log D
LEVEL = 0.95
ALPHAS, GRID = (0.02, 4.0), 240
ZOOMS = 6  # of the grid of alpha, at most; it ends with LEAST_ALLOWED values that the points allow
LEAST_ALLOWED = 60
OPTIMUM = 20.0  # tokens per parameter: table 3 of the source (Chinchilla: 1.4 T tokens, 70 B parameters)
OPTIMUM_SOURCE = "Hoffmann et al., arXiv:2203.15556"
# (A, alpha) of the size's term A·N^-alpha: section 3.3 of the same, and its replication, Besiroglu et al., arXiv:2404.10102
SIZE_TERMS = ((406.4, 0.34), (482.01, 0.3478))
SIZES = (44e6, 16e9)  # parameters of the models behind these fits


@dataclass(frozen=True)
class Fit:
    """L = E + A·(D / scale)^-alpha at every alpha, and which of them the points allow. Arrays are (G,)."""

    scale: float  # the largest D
    tokens_N: np.ndarray
    loss_N: np.ndarray
    alpha_G: np.ndarray
    slack_G: np.ndarray  # sum of squares that is left to the limit; below 0: not allowed
    e_G: np.ndarray
    a_G: np.ndarray
    inverse_G22: np.ndarray  # of the normal equations; the part of E is 0 where E is held at 0

    @property
    def best(self) -> int:
        return int(self.slack_G.argmax())

    def at(self, tokens: float) -> dict[str, float]:
        """The loss at D = `tokens`: estimate, low, high. `math.inf` asks for E."""
        estimate, low, high = self._interval(1.0, self._power(tokens))
        return {"loss": estimate, "low": low, "high": high}

    def gain(self, end: float) -> dict[str, float]:
        """What the loss falls from the last point on, along the curve to D = `end`: estimate, low, high."""
        estimate, low, high = self._interval(0.0, 1.0 - self._power(end))
        return {"gain": estimate, "low": low, "high": high}

    def _power(self, tokens: float) -> np.ndarray:
        return (tokens / self.scale) ** -self.alpha_G if math.isfinite(tokens) else np.zeros(len(self.alpha_G))

    def _interval(self, of_e: float, of_a_G: np.ndarray) -> tuple[float, float, float]:
        """Of `of_e`·E + `of_a`·A at each alpha: the estimate, and the least and the largest value that the points allow."""
        mean_G = of_e * self.e_G + self.a_G * of_a_G
        point_G2 = np.stack([np.full_like(of_a_G, of_e), of_a_G], axis=-1)
        spread_G = np.einsum("gi,gij,gj->g", point_G2, self.inverse_G22, point_G2)
        allowed = self.slack_G >= 0
        half_G = np.sqrt(self.slack_G[allowed] * np.maximum(spread_G[allowed], 0))
        low, high = float((mean_G[allowed] - half_G).min()), float((mean_G[allowed] + half_G).max())
        return float(mean_G[self.best]), max(0.0, low), high

    @property
    def alpha(self) -> dict[str, float | None]:
        """The exponent; a bound at the end of what was tried is None: the points set none."""
        allowed = np.flatnonzero(self.slack_G >= 0)
        low, high = float(self.alpha_G[allowed[0]]), float(self.alpha_G[allowed[-1]])
        bounds = {"low": low if low > ALPHAS[0] else None, "high": high if high < ALPHAS[1] else None}
        return {"value": float(self.alpha_G[self.best]), **bounds}


class TooLittle(ValueError):
    """The points do not allow a fit; the message says why."""


def fit(tokens_N: np.ndarray, loss_N: np.ndarray, weight_N: np.ndarray | None = None) -> Fit:
    """Fit the curve.

    Args:
        weight_N: how many observations each point is the mean of.

    Raises:
        TooLittle: fewer than 12 points from D_max/32 on, D does not span a factor of 4, or the loss does not fall.
    """
    weight_N = np.ones(len(tokens_N)) if weight_N is None else weight_N
    known = np.isfinite(loss_N) & (tokens_N > 0) & (weight_N > 0)
    scale = float(tokens_N[known].max()) if known.any() else 1.0
    known &= tokens_N >= scale / RANGE
    tokens_N, loss_N, weight_N = tokens_N[known], loss_N[known], weight_N[known]
    if len(tokens_N) < LEAST_POINTS:
        raise TooLittle(f"{len(tokens_N)} points, at least {LEAST_POINTS} are needed")
    if scale < LEAST_SPAN * tokens_N.min():
        raise TooLittle(
            f"the points span a factor of {scale / tokens_N.min():.1f} in tokens, at least {LEAST_SPAN:g} is needed"
        )
    low, high = ALPHAS
    for _ in range(ZOOMS):
        found = _profile(np.geomspace(low, high, GRID), scale, tokens_N, loss_N, weight_N)
        allowed = np.flatnonzero(found.slack_G >= 0)
        if len(allowed) >= LEAST_ALLOWED:
            break
        low, high = (float(found.alpha_G[place]) for place in (max(0, allowed[0] - 1), min(GRID - 1, allowed[-1] + 1)))
    return found


def _profile(alpha_G: np.ndarray, scale: float, tokens_N: np.ndarray, loss_N: np.ndarray, weight_N: np.ndarray) -> Fit:
    """The fit over these alphas."""
    x_GN = (tokens_N / scale) ** -alpha_G[:, None]
    e_G, a_G, inverse_G22 = _least_squares(x_GN, loss_N, weight_N)
    residual_GN = (loss_N - e_G[:, None] - a_G[:, None] * x_GN) * np.sqrt(weight_N)
    squares_G = np.where(a_G > 0, (residual_GN**2).sum(-1), np.inf)
    best = int(squares_G.argmin())
    if not math.isfinite(squares_G[best]):
        raise TooLittle("the loss does not fall over these points")
    degrees = len(loss_N) - 3
    alike = _autocorrelation(residual_GN[best])
    limit = squares_G[best] * (1 + student(degrees) ** 2 / degrees * (1 + alike) / (1 - alike))
    return Fit(scale, tokens_N, loss_N, alpha_G, limit - squares_G, e_G, a_G, inverse_G22)


def _least_squares(x_GN: np.ndarray, y_N: np.ndarray, w_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E and A >= 0 for each alpha, and the inverse of the normal equations of what is free."""
    sum_w, sum_x, sum_xx = w_N.sum(), (w_N * x_GN).sum(-1), (w_N * x_GN**2).sum(-1)
    sum_y, sum_xy = float((w_N * y_N).sum()), (w_N * y_N * x_GN).sum(-1)
    det_G = np.maximum(sum_w * sum_xx - sum_x**2, 1e-300)
    a_G = (sum_w * sum_xy - sum_x * sum_y) / det_G
    e_G = (sum_y - a_G * sum_x) / sum_w
    inverse_G22 = (
        np.stack([sum_xx, -sum_x, -sum_x, np.full_like(sum_x, sum_w)], axis=-1).reshape(-1, 2, 2) / det_G[:, None, None]
    )
    held = e_G < 0
    a_G, e_G = np.where(held, sum_xy / sum_xx, a_G), np.where(held, 0.0, e_G)
    inverse_G22[held] = 0
    inverse_G22[held, 1, 1] = 1 / sum_xx[held]
    return e_G, a_G, inverse_G22


def _autocorrelation(residual_N: np.ndarray) -> float:
    """Of neighbours, in [0, 0.9]; a fit of three constants takes about 3 / N of it away, which is added again."""
    whole = float((residual_N**2).sum())
    if not whole > 0:
        return 0.0
    return min(0.9, max(0.0, float((residual_N[1:] * residual_N[:-1]).sum()) / whole + 3 / len(residual_N)))


def student(degrees: int) -> float:
    """The two-sided point of Student's t (Cornish-Fisher; right to 0.5 % from 5 degrees on)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def points(history: History, warmup: int = 0) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """What the curve is fitted to: evaluations where there are enough, else means of the training loss equally far in log D.

    Returns:
        where they are from, D (N,), loss (N,), observations behind each (N,).
    """
    step_N, tokens_N, loss_N = history.steps.step, history.steps["tokens"], history.steps["loss"]
    if not len(step_N):
        return "evaluations", np.zeros(0), np.zeros(0), np.zeros(0)
    late = history.evals.step > warmup
    measured = np.interp(history.evals.step[late], step_N, tokens_N)
    if np.sum(measured >= tokens_N[-1] / RANGE) >= LEAST_POINTS:
        return "evaluations", measured, history.evals["loss"][late], np.ones(int(late.sum()))
    known = np.isfinite(loss_N) & (tokens_N > 0) & (step_N > warmup)
    tokens_N, loss_N = tokens_N[known], loss_N[known]
    if not len(tokens_N):
        return "training loss", tokens_N, loss_N, loss_N
    edges = np.geomspace(tokens_N[-1] / RANGE, tokens_N[-1], BINS + 1)
    place_N = np.clip(np.searchsorted(edges, tokens_N) - 1, -1, BINS - 1)
    inside = place_N >= 0
    count_B = np.bincount(place_N[inside], minlength=BINS).astype(np.float64)
    means = [
        np.bincount(place_N[inside], values[inside], BINS) / np.maximum(count_B, 1) for values in (np.log(tokens_N), loss_N)
    ]
    full = count_B > 0
    return "training loss", np.exp(means[0][full]), means[1][full], count_B[full]


def scaling(history: History, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The advice, for a report. Every loss comes with the interval that its points allow; what cannot be had is named.

    Returns:
        `status` (estimated, unknown) and `reason`; `from`, `points`, `warmup_steps` (left out), `level`; `exponent` and
        `floor` (E) with bounds; `now`, `end` (of the planned steps), `twice_the_data`: tokens, loss, low, high;
        `tokens_per_parameter` (value, optimum, source, advice); `half_the_model`, `half_the_model_twice_the_data`: loss, low,
        high, or why they are unknown.
    """
    steps = history.steps
    warmup = (config or {}).get("warmup_steps")
    warmup = warmup if isinstance(warmup, int) else 0
    source, tokens_N, loss_N, weight_N = points(history, warmup)
    seen = float(steps["tokens"].max()) if len(steps) else 0.0
    found: dict[str, Any] = {"status": "unknown", "reason": "", "from": source, "points": len(tokens_N), "level": LEVEL}
    found["warmup_steps"] = warmup
    active = _active_parameters(config)
    found["tokens_per_parameter"] = _ratio(seen, active)
    try:
        curve = fit(tokens_N, loss_N, weight_N)
    except TooLittle as why:
        return found | {"reason": str(why)}
    planned = seen * history.total_steps / int(steps.step[-1]) if history.total_steps and steps.step[-1] > 0 else None
    places = {"now": seen, "twice_the_data": 2 * seen} | ({"end": planned} if planned and planned > seen else {})
    found |= {"status": "estimated", "points": len(curve.tokens_N), "exponent": curve.alpha, "floor": curve.at(math.inf)}
    found |= {name: {"tokens": tokens, **curve.at(tokens)} for name, tokens in places.items()}
    for name, tokens in (("half_the_model", seen), ("half_the_model_twice_the_data", 2 * seen)):
        found[name] = _half(curve.at(tokens), active)
    return found


def _active_parameters(config: Mapping[str, Any] | None) -> int | None:
    """Parameters that a token uses, the embedding among them, as the published fits count."""
    if config is None:
        return None
    try:
        counts = parameter_counts(DeepSeekConfig.from_config(Config(**config)))
    except ConfigError:  # vocab_size is auto: the run was never started
        return None
    return counts.active + counts.embeddings


def _ratio(tokens: float, active: int | None) -> dict[str, Any]:
    value = tokens / active if active and tokens else None
    if value is None:
        words = "unknown: no tokens were counted yet" if active else "unknown: the run's configuration cannot be read"
    elif value < OPTIMUM / 2:
        words = "more data helps more than a larger model"
    elif value <= 2 * OPTIMUM:
        words = "near the optimum of a given compute"
    else:
        words = "for the same compute a larger model would do better; a small one is cheaper to use"
    return {"value": value, "parameters": active, "optimum": OPTIMUM, "source": OPTIMUM_SOURCE, "advice": words}


def _half(at: Mapping[str, float], active: int | None) -> dict[str, Any]:
    """The loss with half the parameters: what the published fits of the size's term add, all of them inside the interval."""
    if active is None:
        return {"unknown": "the run's configuration cannot be read"}
    if active / 2 < SIZES[0] or active > SIZES[1]:
        return {"unknown": f"{active:,} active parameters: the published fits are of {SIZES[0]:,.0f} to {SIZES[1]:,.0f}"}
    added = [a * ((active / 2) ** -alpha - active**-alpha) for a, alpha in SIZE_TERMS]
    middle = sum(added) / len(added)
    return {
        "loss": at["loss"] + middle,
        "low": at["low"] + min(added),
        "high": at["high"] + max(added),
        "source": "published fits",
    }
