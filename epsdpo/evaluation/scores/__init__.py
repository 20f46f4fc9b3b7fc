"""From judgements of any origin to win rates with intervals. Needs no models and no torch."""
