"""What is refused because of what was asked for, and not because something broke."""


class ConfigError(ValueError):
    """A config that cannot be run. The message names the file, the key, the value and the remedy."""
