"""Evaluation: prompts are answered, answers compared, and the numbers written.

`run` knows the order of the work; scoring judgements of any origin (`scores`, `compare`) needs neither torch nor models.
"""
