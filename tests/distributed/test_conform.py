"""The command `conform` whole, with the clause that takes two processes: a table, and exit codes 0 and 1."""

import sys

import pytest
from kit.launching import kill, start


@pytest.mark.parametrize(
    "trainer, code, two_ranks, counted",
    [
        ("epsdpo:EpsilonDPOTrainer", 0, "holds: 3 + 3 pairs", "11 hold, 0 broken, 0 could not be asked"),
        ("kit.plain_epsilon_dpo:RankAlone", 1, "broken: rank ", "10 hold, 1 broken, 0 could not be asked"),
        ("kit.plain_epsilon_dpo:OneProcessOnly", 0, "could not be asked: rank ", "10 hold, 0 broken, 1 could not be"),
    ],
)
def test_the_table_ends_in_two_ranks(trainer, code, two_ranks, counted):
    process = start(sys.executable, "-m", "epsdpo", "conform", trainer)
    try:
        said, _ = process.communicate(timeout=280)
    finally:
        kill(process)
    assert process.returncode == code, said
    assert f"Algorithm 1, line 5   {two_ranks}" in next(
        line for line in said.splitlines() if line.startswith("two ranks")
    )
    assert said.splitlines()[-1].startswith(counted)
