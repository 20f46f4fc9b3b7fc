"""Preference pairs of the starting model's own responses: asked, scored, best and worst kept (paper, Table 3).

`sample` runs it, `rank` scores responses, `scores` keeps the scores, `pairs` chooses, `folder` is what later stages
know of it. How models answer is left to `epsdpo.models`, what becomes of the pairs to `epsdpo.data.prepared`.
"""
