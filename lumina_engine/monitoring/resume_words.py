"""The proof of a resume in words: the same lines for the command line, the report and the terminal."""

from __future__ import annotations

from .record import Resume


def resume_words(proof: Resume) -> list[str]:
    """The proof for a person, a line for each part."""
    rate = "-" if proof.lr is None else f"{proof.lr:.6g}"
    lines = [
        f"resumed from {proof.path}: step {proof.step:,}, {proof.tokens:,} tokens, epoch {proof.epoch} row {proof.index:,}, "
        f"next learning rate {rate}",
        f"next samples {', '.join(map(str, proof.samples))} … (rows {proof.rows_digest})"
        + (f", {proof.skipped_rows:,} rows left out by rollbacks" if proof.skipped_rows else ""),
        f"data {proof.data}, configuration {proof.config}, generators {' '.join(proof.rng)}",
    ]
    changed = [f"{name} {before} -> {after}" for name, (before, after) in proof.changed.items()]
    return [*lines, "since the checkpoint: " + ("; ".join(changed) if changed else "nothing changed")]
