"""Judges: which of two outputs answers an instruction better, asked so that no answer is lost and none is made up.

One module per kind of judge: `chat` (any OpenAI-compatible server), `causal_lm`, `reward_model` and `pair_ranker`
(through transformers), `gold` (the embedded world). `run` asks any of them and keeps what they say in `store`;
`results` puts it into numbers, `calibrate` beside published judgements. What the preferences come to is left to
`epsdpo.evaluation`.
"""
