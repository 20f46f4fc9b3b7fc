"""Numbers that the paper prints, beside which this kit's are put."""

# Table 5: ε_c, ε_s, win rate by PairRM (%), mean step; Anthropic-HH, gemma-2-2b, β = 0.05, one run each.
TABLE_5 = (
    (0.005, 0.005, 76.4, 0.07),
    (0.005, 0.01, 76.7, 0.07),
    (0.005, 0.02, 76.4, 0.07),
    (0.01, 0.005, 78.4, 0.24),
    (0.01, 0.01, 79.2, 0.25),
    (0.01, 0.02, 77.4, 0.24),
    (0.02, 0.005, 74.9, 0.34),
    (0.02, 0.01, 74.2, 0.35),
    (0.02, 0.02, 74.6, 0.34),
)
