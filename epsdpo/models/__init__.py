"""Responses to prompts from anywhere, by models anywhere, kept so that nothing is asked twice.

`prompts` reads what is asked, `rendering` makes it what the model reads and holds it to training's prompts, `respond`
asks an engine for what `store` does not have yet. The engines know one way of decoding each: `local` transformers,
`vllm` and `server`. What the responses are worth is left to `epsdpo.evaluation`.
"""
