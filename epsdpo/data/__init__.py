"""Preference pairs: read from anywhere, checked, rendered, tokenised once, and kept for every later stage."""
