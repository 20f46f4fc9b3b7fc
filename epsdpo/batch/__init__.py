"""Batches of experiments: planned, run one notebook a stage, watched, indexed; and checked without being run."""
