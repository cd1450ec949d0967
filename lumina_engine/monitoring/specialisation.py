"""What experts specialise in, which work together, and how many tokens keep their experts: from routers' choices on real rows.

Shapes: N tokens, K experts per token, L expert layers, E experts, X values of what a token is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

SHUFFLES = 5  # orders at random that show what chance gives
TOP = 5  # tokens of an expert, pairs of a layer
LEAST_COUNT = 5  # of a token in an expert before it is named
SEED = 0


def information(x_N: np.ndarray, expert_NK: np.ndarray) -> dict[str, float]:
    """How much of the choice of experts a property of the token tells.

    Returns:
        `bits`: mutual information of the property and an expert that was chosen, as counted, less what the same counts give in
        random order (the mean of 5; counts of few tokens always seem to tell something), at least 0; `chance`: that mean;
        `share`: of the entropy of the choice.
    """
    _, x_N = np.unique(x_N, return_inverse=True)
    top_k = expert_NK.shape[1]
    x_M, expert_M = np.repeat(x_N, top_k), expert_NK.reshape(-1)
    draw = np.random.default_rng(SEED)
    counted = _mutual_bits(x_M, expert_M)
    chance = float(np.mean([_mutual_bits(np.repeat(draw.permutation(x_N), top_k), expert_M) for _ in range(SHUFFLES)]))
    entropy = _entropy_bits(np.bincount(expert_M))
    bits = max(0.0, counted - chance)
    return {"bits": bits, "chance": chance, "share": bits / entropy if entropy > 0 else 0.0}


def _entropy_bits(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _mutual_bits(x_M: np.ndarray, y_M: np.ndarray) -> float:
    joint = np.unique(x_M.astype(np.int64) * (int(y_M.max()) + 1) + y_M, return_counts=True)[1]
    return _entropy_bits(np.bincount(x_M)) + _entropy_bits(np.bincount(y_M)) - _entropy_bits(joint)


def octaves(position_N: np.ndarray) -> np.ndarray:
    """Positions in groups that double: 0, 1-2, 3-6, 7-14, …"""
    return np.log2(position_N.astype(np.float64) + 1).astype(np.int64)


def specialisation(
    layers: Sequence[int],
    experts: int,
    experts_LNK: np.ndarray,
    token_N: np.ndarray,
    position_N: np.ndarray,
    task_N: np.ndarray,
    tasks: Sequence[str],
    text_of: Callable[[int], str] = str,
) -> dict[str, Any]:
    """Which tokens, positions and tasks go to which expert, and which experts work together.

    Returns:
        `tokens`, `tasks`, and for each of `layers`: `layer`; `told_by` (`information` of token, position and task, and of the
        expert in the expert layer before); `experts` (share of choices, top tokens against their base rate, median position,
        lift of each task); `pairs` (co-activation: pairs of experts against what their own loads would give; empty where a
        token has one expert).
    """
    found = []
    for place, layer in enumerate(layers):
        chosen_NK = experts_LNK[place]
        told = {"token": information(token_N, chosen_NK), "position": information(octaves(position_N), chosen_NK)}
        if len(tasks) > 1:
            told["task"] = information(task_N, chosen_NK)
        if place:
            told["layer_before"] = information(experts_LNK[place - 1][:, 0], chosen_NK)
        rows = [_expert(expert, chosen_NK, token_N, position_N, task_N, tasks, text_of) for expert in range(experts)]
        found.append({"layer": layer, "told_by": told, "experts": rows, "pairs": pairs(chosen_NK, experts)})
    return {"tokens": len(token_N), "tasks": list(tasks), "layers": found}


def _expert(
    expert: int,
    chosen_NK: np.ndarray,
    token_N: np.ndarray,
    position_N: np.ndarray,
    task_N: np.ndarray,
    tasks: Sequence[str],
    text_of: Callable[[int], str],
) -> dict[str, Any]:
    mine_N = (chosen_NK == expert).any(-1)
    count = int(mine_N.sum())
    row: dict[str, Any] = {"expert": expert, "share": count / chosen_NK.size, "tokens": count}
    row["top_tokens"] = _top_tokens(token_N, mine_N, text_of)
    row["median_position"] = float(np.median(position_N[mine_N])) if count else None
    if len(tasks) > 1:
        base, own = (np.bincount(part, minlength=len(tasks)) / max(len(part), 1) for part in (task_N, task_N[mine_N]))
        row["task_lift"] = {name: float(own[i] / base[i]) if base[i] else None for i, name in enumerate(tasks)}
    return row


def _top_tokens(token_N: np.ndarray, mine_N: np.ndarray, text_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """The tokens that say most about the expert: by count · log(lift), their part of the mutual information."""
    size = int(token_N.max()) + 1 if len(token_N) else 0
    count_X, all_X = np.bincount(token_N[mine_N], minlength=size), np.bincount(token_N, minlength=size)
    expected_X = all_X * (mine_N.mean() if len(mine_N) else 0.0)
    likely = np.flatnonzero((count_X >= LEAST_COUNT) & (count_X > expected_X))
    score = count_X[likely] * np.log(count_X[likely] / expected_X[likely])
    order = likely[np.argsort(-score, kind="stable")][:TOP]
    return [
        {"token": int(t), "text": text_of(int(t)), "count": int(count_X[t]), "lift": float(count_X[t] / expected_X[t])}
        for t in order
    ]


def pairs(chosen_NK: np.ndarray, experts: int) -> list[dict[str, Any]]:
    """Pairs of experts that serve the same tokens most above what the loads of the two give, as many of those most below.

    The expected number of a pair is in proportion to the product of the two loads, summed up to the number of all pairs.
    """
    if chosen_NK.shape[1] < 2:
        return []
    counts_EE = np.zeros((experts, experts))
    for one, other in combinations(range(chosen_NK.shape[1]), 2):
        np.add.at(counts_EE, (chosen_NK[:, one], chosen_NK[:, other]), 1)
    counts_EE += counts_EE.T
    load_E = np.bincount(chosen_NK.reshape(-1), minlength=experts).astype(np.float64)
    upper = np.triu_indices(experts, 1)
    product = np.outer(load_E, load_E)[upper]
    expected = product / max(product.sum(), 1) * counts_EE[upper].sum()
    lifts = [
        (counts_EE[e, f] / want, int(e), int(f)) for e, f, want in zip(*upper, expected, strict=True) if want >= LEAST_COUNT
    ]
    lifts.sort(key=lambda item: (-item[0], item[1:]))
    rows = [{"experts": [e, f], "count": int(counts_EE[e, f]), "lift": float(lift)} for lift, e, f in lifts]
    return rows if len(rows) <= 2 * TOP else rows[:TOP] + rows[-TOP:]


def kept_experts(before_LNK: np.ndarray, after_LNK: np.ndarray, experts: int) -> dict[str, list[float]]:
    """Stability of routing: the same tokens at two checkpoints, by layer.

    Returns:
        `same`: share of tokens with the same set of experts; `overlap`: mean share of a token's experts that stayed; `chance`:
        the overlap of choices that do not depend on the token, with the loads of both.
    """
    kept: dict[str, list[float]] = {"same": [], "overlap": [], "chance": []}
    for before_NK, after_NK in zip(before_LNK, after_LNK, strict=True):
        stayed_N = (before_NK[:, :, None] == after_NK[:, None, :]).any(-1).sum(-1)
        top_k, tokens = before_NK.shape[1], max(len(before_NK), 1)
        loads = [np.bincount(part.reshape(-1), minlength=experts) / tokens for part in (before_NK, after_NK)]
        kept["same"].append(float((stayed_N == top_k).mean()))
        kept["overlap"].append(float(stayed_N.mean() / top_k))
        kept["chance"].append(float(loads[0] @ loads[1] / top_k))
    return kept
