"""Evaluation: prompts are answered, answers compared, and the numbers written.

`run` knows the order of the work. Scoring judgements of any origin (`scores`, `compare`) needs no models and no torch.
"""
