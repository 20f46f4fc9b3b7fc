"""Evaluation: prompts are answered, answers compared, and the numbers written."""
