"""Figures: drawing only. Each module draws what one stage measured; `style` says how everything looks and is saved."""

from epsdpo.plots.style import save

__all__ = ["save"]
