"""What a run's models can do besides what they were trained for: the paper's Table 8, by lm-evaluation-harness.

`tasks` names what is asked, `measure` decides what is due and keeps the answers, `harness` asks one model in a process
of its own, and `results` reads and shows what came out. Only `harness` loads the harness, which is an optional extra.
"""
