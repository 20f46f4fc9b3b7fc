"""Judges: which of two outputs answers an instruction better, asked so that no answer is lost and none is made up.

One module per kind of judge: `chat` (any OpenAI-compatible server), `causal_lm`, `reward` and `pair_ranker` (through
transformers), `gold` (the embedded world). `ask` puts comparisons before any of them, `counts` says what came of it.
"""
