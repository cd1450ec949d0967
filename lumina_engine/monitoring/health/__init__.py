"""Health of a run, from its records alone: detectors, sub-scores, alerts."""
