"""Which of AlpacaEval's 805 prompts an instruction is, told by its digest: the texts themselves are not carried.

Published difficulties are numbered in AlpacaEval's own order, and judgements come in any: this joins them.
"""

import hashlib
from pathlib import Path

# The first 12 digits of the SHA-256 of each prompt's text in UTF-8, without surrounding whitespace, from prompt 0 on.
_DIGESTS = Path(__file__).with_suffix(".txt").read_text(encoding="ascii").split()
_NUMBERS = {digest: number for number, digest in enumerate(_DIGESTS)}
N_PROMPTS = len(_DIGESTS)


def prompt_number(instruction: str) -> int | None:
    """The number of an AlpacaEval prompt, from 0 to 804, whatever whitespace surrounds it; None for any other text."""
    digest = hashlib.sha256(instruction.strip().encode("utf-8", "surrogatepass")).hexdigest()
    return _NUMBERS.get(digest[: len(_DIGESTS[0])])
