"""The runs of a folder, joined and compared."""
