"""Claims of a paper, tested on a batch of runs: claims file → measures of each run → effects → verdicts.

What is claimed, how it is tested and what counts as holding stands in a file that is fixed before the runs begin
(`settings`). `measures` reads one number per run, `effects` makes of them one number per world, `verdicts` an interval
and a verdict. Figures are left to `epsdpo.paper.claims.drawing`.
"""
