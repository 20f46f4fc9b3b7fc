"""Whether a run is the published one: the same bits, within its prediction intervals, or from which step another."""
