"""Claims of a paper, tested on a batch of runs: claims file → measures of each run → effects → verdicts.

What is claimed, how it is tested and what counts as holding stands in a file that is fixed before the runs begin
(`settings`). Each measure is one number per run, each effect one per world; a verdict follows from its interval.
"""
