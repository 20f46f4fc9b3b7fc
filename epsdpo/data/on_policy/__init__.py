"""Preference pairs of the starting model's own responses: asked, scored, best and worst kept (paper, Table 3)."""
