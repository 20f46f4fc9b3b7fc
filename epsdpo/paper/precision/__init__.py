"""What rounding does to the criterion: a model of it, what was measured, and the released code's own runs."""
