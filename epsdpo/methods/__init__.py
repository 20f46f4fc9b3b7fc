"""The methods beside ε-DPO: their arguments (`configs`), their formulas, and their trainers (`trainers` finds them)."""
