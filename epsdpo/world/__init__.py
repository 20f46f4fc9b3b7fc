"""The embedded world: a small language with a verifiable reward, its model, and pairs made from it."""
