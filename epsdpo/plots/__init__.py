"""How figures look, are told apart, kept and shown, and what each stage draws. Drawing only: no number is made here."""

from epsdpo.plots.saving import save, show

__all__ = ["save", "show"]
