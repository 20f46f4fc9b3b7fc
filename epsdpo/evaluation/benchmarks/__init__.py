"""What a run's models can do besides what they were trained for: the paper's Table 8, by lm-evaluation-harness.

The harness is an optional extra, and loaded only in the process that asks a model.
"""
