"""Detectors over the steps and evaluations of a run: loss, gradient, learning rate.

Each says in its docstring what it looks at, from how many values on, and at which levels it opens and closes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from .. import record as rec
from .detector import Detector, Sign
from .windows import Windows, theil_sen

WARM = 64  # steps before which nothing about the course of a run is judged
LEAST_RISE = 0.1  # of a loss that diverges; what is learned by heart rises from 0.003 to 0.006 and is none the worse


class NonFinite(Detector):
    """Loss or gradient that is no number. Critical at 3 in a row or 5 in 100 steps; closed after 100 finite steps.

    A gradient that overflowed under a loss scale, which then sank, does not count.
    """

    codes = ("nonfinite_step", "nonfinite_run")
    types = (rec.Step,)

    def look(self, seen: Windows) -> Iterator[Sign]:
        if not seen.nonfinite:
            return
        if not seen.nonfinite[-1][1]:
            if seen.spell_over(100):
                yield from (Sign(code, False) for code in self.codes)
            return
        now = f"step {seen.step}: "
        advice = "one such step is harmless; if it repeats set precision=fp32 or a lower learning_rate"
        yield Sign("nonfinite_step", True, "warning", now + "loss or gradient is not finite", advice)
        recent = seen.nonfinite_in(100)
        if seen.nonfinite_in_row >= 3 or recent >= 5:
            words = f"{now}{seen.nonfinite_in_row} steps in a row are not finite, {recent} of the last 100"
            advice = f"{_go_back(seen, 'max_grad_norm=1.0')} (or precision=fp32); then {_lower_rate(seen)}"
            yield Sign("nonfinite_run", True, "critical", words, advice)


class Spike(Detector):
    """One loss beyond 6 deviations of the 64 before (from 32 on), or 12 of their noise, above the median of 16.

    Closed at once by a value inside 3: who counts spikes goes on.
    """

    codes = ("loss_spike",)
    types = (rec.Step,)

    def look(self, seen: Windows) -> Iterator[Sign]:
        if not seen.loss.known or not seen.loss.recent or seen.nonfinite[-1][1]:
            return
        z = seen.loss.standing(seen.loss.recent[-1])
        if z > 6:
            words = f"step {seen.step}: loss {math.exp(seen.loss.recent[-1]):.4g} is {z:.1f} sigma above its recent median"
            yield Sign("loss_spike", True, "warning", words, f"one is harmless; if they repeat: {_lower_rate(seen)}")
        elif z < 3:
            yield Sign("loss_spike", False)


class Divergence(Detector):
    """The loss has risen and stays up.

    6 of the newest 8 losses beyond 3 deviations (noise of the 64 before them) above the median of the 16 before them, and
    their median at least a fifth, and 0.1, above it. From 64 steps on. Closed when the median of 8 is back within 1 deviation
    of the level that it left, and where rows get another length, since that level is no longer one. Until then each step gives
    the sign again, so that one that falls into a quiet time is not lost.
    """

    codes = ("divergence",)
    types = (rec.Step,)

    def __init__(self) -> None:
        self._well: float | None = None  # log loss at which it is over, while it lasts
        self._sign: Sign | None = None  # what was seen when it began, while it lasts
        self._lengths = 0  # lengths of rows that had ended when it began

    def look(self, seen: Windows) -> Iterator[Sign]:
        loss = seen.loss
        if self._sign is not None and seen.lengths != self._lengths:
            self._well = self._sign = None
            yield Sign("divergence", False)
        if seen.steps < WARM or not loss.known or len(loss.recent) < loss.recent.maxlen:  # type: ignore[operator]
            return
        if self._well is not None and self._sign is not None:
            if median(loss.recent) <= self._well:
                self._well = self._sign = None
                yield Sign("divergence", False)
            else:
                yield self._sign
            return
        if loss.recent[-1] - loss.middle <= loss.sigma:  # most steps end here
            return
        far = sum(loss.z(value) > 3 for value in loss.recent)
        if far < 6:
            return
        now, was = math.exp(median(loss.recent)), math.exp(loss.middle)
        if now >= max(1.2 * was, was + LEAST_RISE):
            self._well, self._lengths = loss.middle + loss.sigma, seen.lengths
            words = (
                f"step {seen.step}: the loss went up from {was:.4g} to {now:.4g} and stays there ({far} of 8 beyond 3 sigma)"
            )
            advice = f"{_go_back(seen, before=max(0, seen.step - 8))}; then {_lower_rate(seen)}"
            self._sign = Sign("divergence", True, "critical", words, advice)
            yield self._sign


class GradientTail(Detector):
    """8 or more of the last 500 gradient norms (from 128 on) above ten times their median. Closed below 3."""

    codes = ("gradient_tail",)
    types = (rec.Step,)

    def __init__(self) -> None:
        self._count = 0

    def look(self, seen: Windows) -> Iterator[Sign]:
        self._count += 1
        if self._count % 16 or len(seen.norms) < 128:
            return
        middle = median(norm for _, norm in seen.norms)
        wild = sum(norm > 10 * middle for _, norm in seen.norms)
        if wild >= 8:
            words = (
                f"step {seen.step}: {wild} of {len(seen.norms)} gradient norms are above ten times their median {middle:.3g}"
            )
            advice = f"set max_grad_norm=1.0; if it is: gradient_accumulation_steps=2, or {_lower_rate(seen)}"
            yield Sign("gradient_tail", True, "warning", words, advice)
        elif wild < 3:
            yield Sign("gradient_tail", False)


class RateJump(Detector):
    """The learning rate more than doubles from one step to the next, after step 10, and nobody has set it.

    No schedule does that: a linear warm-up grows by a tenth there, all others fall. A resume that changes the schedule sets the
    rate of its first step. Critical from three times on. Closed when the rate is back at twice the last good one; until then
    each step gives the sign again, so that one that falls into a quiet time is not lost.
    """

    codes = ("rate_jump",)
    types = (rec.Step,)

    def __init__(self) -> None:
        self._before: tuple[int, float] | None = None
        self._good: float | None = None  # the rate before the jump, while it lasts
        self._sign: Sign | None = None  # what was seen at the jump, while it lasts

    def look(self, seen: Windows) -> Iterator[Sign]:
        last = seen.last
        if last is None or not last.lr:
            return
        before, self._before = self._before, (last.step, last.lr)
        if self._good is not None and (last.lr <= 2 * self._good or seen.rate_set >= last.step - 1):
            self._good = self._sign = None
            yield Sign("rate_jump", False)
        if self._sign is not None:
            yield self._sign
        elif before is not None and last.step > 10 and last.step == before[0] + 1 and seen.rate_set < before[0]:
            yield from self._jump(before[1], last, seen.run)

    def _jump(self, before: float, last: rec.Step, run: str | None) -> Iterator[Sign]:
        """The sign of a step whose rate is more than twice that of the step `before` it."""
        if last.lr is None or last.lr <= 2 * before:
            return
        self._good, times = before, last.lr / before
        words = f"step {last.step}: the learning rate went from {before:.3g} to {last.lr:.3g} in one step"
        command = "set it back" if run is None else f"lumina-engine runs set-lr {run} {before:.3g}"
        advice = f"no schedule does that: {command}"
        self._sign = Sign("rate_jump", True, "critical" if times >= 3 else "warning", words, advice)
        yield self._sign


class Plateau(Detector):
    """The slope of the last 5 evaluation losses has an interval (Theil-Sen, 95 %) that covers 0, and the best is not new."""

    codes = ("eval_plateau",)
    types = (rec.Eval,)

    def look(self, seen: Windows) -> Iterator[Sign]:
        if len(seen.evals) < 5:
            return
        values = [math.log(loss) for _, loss, _ in list(seen.evals)[-5:]]
        slope, low, high = theil_sen(values)
        if high < 0 or values[-1] < min(values[:-1]):
            yield Sign("eval_plateau", False)
        elif low <= 0 <= high and abs(slope) < 0.01:
            words = f"step {seen.step}: the evaluation loss has not moved over 5 evaluations ({100 * slope:+.2f} % each)"
            yield Sign("eval_plateau", True, "info", words, self._advice(seen))

    def _advice(self, seen: Windows) -> str:
        """To stop; while the rate is flat, also to let it fall from here to the last step. One that falls does so already."""
        if seen.run is None:
            return "end it" + (", or let the learning rate fall to the end from here on" if seen.rate_is_flat else "")
        stop = f"lumina-engine runs stop {seen.run}"
        left = (seen.total_steps or 0) - seen.step
        if not seen.rate_is_flat or seen.total_steps is None or left <= 0:
            return f"end it: {stop}"
        decay = f"lr_schedule=wsd decay_ratio={left / seen.total_steps:.6g}"
        resume = f"lumina-engine train --run {seen.run} --resume {decay}"
        return f"end it: {stop}; or let the rate fall to the end: {stop} && {resume}"


class Overfitting(Detector):
    """Evaluation loss up by 2 % or more in each of 3 evaluations while the training loss fell. Closed by a fall."""

    codes = ("overfitting",)
    types = (rec.Eval,)

    def look(self, seen: Windows) -> Iterator[Sign]:
        last = list(seen.evals)[-4:]
        if len(last) < 4:
            return
        losses, begin, end = [loss for _, loss, _ in last], last[0][2], last[-1][2]
        if losses[-1] < losses[-2]:
            yield Sign("overfitting", False)
        elif all(b > 1.02 * a for a, b in pairwise(losses)) and begin is not None and end is not None and end < begin:
            up = f"evaluation loss up from {losses[0]:.4g} to {losses[-1]:.4g} in 3 evaluations"
            words = f"step {seen.step}: {up}, training loss down"
            advice = "stop early (early_stopping_patience=3), train on more data, or set dropout=0.1"
            yield Sign("overfitting", True, "warning", words, advice)


class RepeatedData(Detector):
    """4 of the last 8 batches had exactly the tokens of an earlier one of their epoch. Closed after 8 that had not."""

    codes = ("repeated_data",)
    types = (rec.Step,)

    def __init__(self) -> None:
        self._again: deque[bool] = deque(maxlen=8)

    def look(self, seen: Windows) -> Iterator[Sign]:
        assert seen.last is not None
        before = seen.last.repeats
        self._again.append(before is not None)
        if sum(self._again) >= 4 and before is not None:
            words = (
                f"step {seen.step}: its tokens are exactly those of step {before}, {sum(self._again)} of 8 batches come again"
            )
            advice = (
                "look for repeats with `lumina-engine data report`; a stream or loader that gives the same again is a defect"
            )
            yield Sign("repeated_data", True, "warning", words, advice)
        elif not any(self._again):
            yield Sign("repeated_data", False)


class FrozenLayer(Detector):
    """A part of the model in which no weight changed over two looks of the trainer (32 steps each), while others did.

    Closed 64 steps after the last such look.
    """

    codes = ("frozen_layer",)
    types = (rec.Step,)

    def __init__(self) -> None:
        self._before: frozenset[str] = frozenset()
        self._at = 0

    def look(self, seen: Windows) -> Iterator[Sign]:
        assert seen.last is not None
        if seen.last.frozen:
            still, self._at = frozenset(seen.last.frozen), seen.step
            found, self._before = sorted(still & self._before), still
            if found:
                words = f"step {seen.step}: no weight of {', '.join(found)} has changed in the last steps, others have"
                advice = "in 16 bit small updates are lost: precision=mixed_bf16; else go back to a checkpoint from before"
                yield Sign("frozen_layer", True, "warning", words, advice)
        elif seen.step > self._at + 64:
            self._before = frozenset()
            yield Sign("frozen_layer", False)


def _lower_rate(seen: Windows) -> str:
    """The advice to halve the rate in force. The key is its peak, so a value for it would go through the schedule once more."""
    if seen.run is None or seen.last is None or not seen.last.lr:
        return "set learning_rate to half of what it is"
    return f"halve learning_rate: lumina-engine runs set-lr {seen.run} {seen.last.lr / 2:.3g}"


def _go_back(seen: Windows, key: str = "", before: int | None = None) -> str:
    """The advice to go on from a checkpoint (from before a step) with another key; for a run of ours the commands."""
    place = "go back to a checkpoint" + (f" from before step {before}" if before is not None else "")
    if seen.run is None:
        return place + (f" with {key}" if key else "")
    aside = f"move its checkpoints from step {before} on to another folder; " if before is not None else ""
    resume = f"lumina-engine train --run {seen.run} --resume {key}".rstrip()
    return f"{place}: lumina-engine runs stop {seen.run} --no-save; {aside}{resume}"
