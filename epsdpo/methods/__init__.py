"""The small library: ε-DPO's kernels, trainer, config and record, and the methods beside it.

To read it as the paper: `kernels`, `trainer`, `config`, `record`. Which methods there are stands in `catalogue`.
"""
