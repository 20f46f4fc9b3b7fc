"""Figures: drawing only. Each module draws what one stage measured; `style` says how everything looks, `runs` how runs
of several methods are told apart, and `saving` how a figure is kept and shown."""

from epsdpo.plots.saving import save, show

__all__ = ["save", "show"]
