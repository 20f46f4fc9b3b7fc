"""The sections of a config, one module each: keys, defaults and what they mean."""
