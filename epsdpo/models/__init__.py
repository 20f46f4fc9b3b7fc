"""Which model an experiment starts from, and who answers: models in this process or behind a server, asked once.

An engine answers prompts (`local`, `server`), a reward model scores conversations; whatever is answered is kept at once
(`kept`), so that a killed run asks for the rest alone.
"""
