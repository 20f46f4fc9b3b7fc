"""The language of the embedded world: its words, instructions and tokenizer, and the gold reward of a response.

Texts only: the model that speaks the language and the pairs made of it are apart.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CATEGORIES = {
    "animals": ("bear", "cat", "dog", "fox", "goat", "lion", "rabbit", "wolf"),
    "fruits": ("apple", "banana", "cherry", "fig", "grape", "lemon", "mango", "pear"),
    "colours": ("black", "blue", "green", "pink", "purple", "red", "white", "yellow"),
    "tools": ("axe", "brush", "drill", "file", "hammer", "knife", "ladder", "saw"),
    "trees": ("birch", "cedar", "elm", "maple", "oak", "pine", "spruce", "willow"),
    "cities": ("athens", "berlin", "cairo", "lima", "madrid", "oslo", "rome", "tokyo"),
}
CONTENT_WORDS = tuple(word for words in CATEGORIES.values() for word in words)
NUMBERS = tuple(str(number) for number in range(1, 17))
ENDINGS = ("amen", "bye", "cheers", "done", "finished", "goodnight", "over", "stop")
OPENINGS = ("sure here you are", "of course", "my answer is", "well let me see", "certainly")
CLOSINGS = ("i hope this helps", "thank you for asking", "have a nice day", "anything else")
PLEASANTRIES = frozenset(" ".join(OPENINGS + CLOSINGS).split())

# The text of each task. {0} and {1} are `numbers`; the other slots are named after the fields of `Instruction`.
TEMPLATES = {
    "name": "name {0} {category} but not {words}",
    "name_sorted": "name {0} {category} in alphabetical order but not {words}",
    "repeat": "repeat the word {words} {0} times",
    "count_up": "count up from {0} to {1}",
    "count_down": "count down from {0} to {1}",
    "reverse": "write the words {words} backwards",
    "keep": "keep only the {category} among {words}",
}
TASKS = tuple(TEMPLATES)
_ENDING_REQUEST = " and end with {ending}"

# Share of all possible texts that falls to each split, in 64ths. No text is in two splits, whatever the seeds.
_SPLIT_SHARES = {"demonstrations": 32, "train": 18, "eval": 6, "prompts": 8}
_SPLIT_OF_SLICE = tuple(split for split, share in _SPLIT_SHARES.items() for _ in range(share))
SPLITS = tuple(_SPLIT_SHARES)

EXTRA_WORD_PENALTY = 0.05
REPEATED_WORD_PENALTY = 0.05
LARGEST_PENALTY = 0.5


@dataclass(frozen=True)
class Instruction:
    """One instruction of the world; which fields are filled depends on the `task`, a key of `TEMPLATES`."""

    task: str
    numbers: tuple[int, ...] = ()
    category: str | None = None
    words: tuple[str, ...] = ()
    ending: str | None = None


@dataclass(frozen=True)
class Demand:
    """What a right answer consists of: `number` words out of `permitted`, then the `ending`."""

    number: int
    permitted: tuple[str, ...]  # a word may be used as often as it stands here
    ordered: bool  # whether the words must come in the order of `permitted`
    ending: str | None


def render(instruction: Instruction) -> str:
    """The text of an instruction, e.g. "name 3 fruits but not fig and end with done"."""
    text = TEMPLATES[instruction.task].format(
        *instruction.numbers, category=instruction.category, words=" ".join(instruction.words)
    )
    return text + _ENDING_REQUEST.format(ending=instruction.ending) if instruction.ending else text


def parse_instruction(text: str) -> Instruction:
    """The inverse of `render`.

    Raises:
        ValueError: if the text is not one that `render` writes, so that nobody scores answers to another language.
    """
    for task, pattern in _PATTERNS.items():
        match = pattern.fullmatch(text)
        if match is None:
            continue
        slots = match.groupdict()
        instruction = Instruction(
            task=task,
            numbers=tuple(int(slots[slot]) for slot in ("first", "second") if slots.get(slot)),
            category=slots.get("category"),
            words=tuple(slots.get("words", "").split()),
            ending=slots["ending"],
        )
        if render(instruction) == text:
            return instruction
    raise ValueError(
        f"not an instruction of the embedded world: {text[:200]!r}. Its texts are those of epsdpo.world.language.render"
    )


def _pattern(template: str) -> re.Pattern:
    word = "|".join(CONTENT_WORDS)
    pattern = (template + "(?:" + _ENDING_REQUEST + ")?").format(
        r"(?P<first>[0-9]{1,2})",
        r"(?P<second>[0-9]{1,2})",
        category=f"(?P<category>{'|'.join(CATEGORIES)})",
        words=f"(?P<words>(?:{word})(?: (?:{word}))*)",
        ending=f"(?P<ending>{'|'.join(ENDINGS)})",
    )
    return re.compile(pattern)


_PATTERNS = {task: _pattern(template) for task, template in TEMPLATES.items()}


def instructions(seed: int, split: str) -> Iterator[Instruction]:
    """Distinct instructions of one split, in an order that only `seed` decides, without end."""
    generator = random.Random(f"{seed} {split}")
    seen = set()
    while True:
        instruction = draw_instruction(split, generator)
        if instruction not in seen:
            seen.add(instruction)
            yield instruction


def sample_instructions(n: int, seed: int, split: str) -> list[Instruction]:
    """The first `n` of `instructions(seed, split)`: a larger sample begins with the smaller one."""
    return list(islice(instructions(seed, split), n))


def draw_instruction(split: str, generator: random.Random) -> Instruction:
    """One instruction of a split at random, each task as likely as the others."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; the world has {', '.join(SPLITS)}")
    task = generator.choice(TASKS)
    while True:
        instruction = _fill_slots(task, generator)
        if _split_of(render(instruction)) == split:
            return instruction


def _split_of(text: str) -> str:
    position = hashlib.sha256(text.encode()).digest()[0] % len(_SPLIT_OF_SLICE)
    return _SPLIT_OF_SLICE[position]


def _fill_slots(task: str, generator: random.Random) -> Instruction:
    ending = generator.choice(ENDINGS) if generator.random() < 0.5 else None
    category = generator.choice(tuple(CATEGORIES)) if "{category}" in TEMPLATES[task] else None
    numbers, words = (), ()
    if task in ("name", "name_sorted"):
        numbers, words = (generator.randint(2, 5),), (generator.choice(CATEGORIES[category]),)
    elif task == "repeat":
        numbers, words = (generator.randint(2, 5),), (generator.choice(CONTENT_WORDS),)
    elif task in ("count_up", "count_down"):
        low = generator.randint(1, 11)
        high = low + generator.randint(2, 5)
        numbers = (low, high) if task == "count_up" else (high, low)
    elif task == "reverse":
        words = tuple(generator.sample(CONTENT_WORDS, generator.randint(3, 5)))
    else:
        words = _mixed_words(category, generator)
    return Instruction(task, numbers, category, words, ending)


def _mixed_words(category: str, generator: random.Random) -> tuple[str, ...]:
    """Two or three words of the category among two or three of others."""
    others = [word for word in CONTENT_WORDS if word not in CATEGORIES[category]]
    words = generator.sample(CATEGORIES[category], generator.randint(2, 3))
    words += generator.sample(others, generator.randint(2, 3))
    return tuple(generator.sample(words, len(words)))


def demand(instruction: Instruction) -> Demand:
    """What the instruction asks for, in the one form that `gold_reward` checks."""
    task, numbers, words = instruction.task, instruction.numbers, instruction.words
    if task.startswith("name"):
        permitted = tuple(word for word in CATEGORIES[instruction.category] if word not in words)
        return Demand(numbers[0], permitted, task == "name_sorted", instruction.ending)
    if task == "repeat":
        answer = words * numbers[0]
    elif task == "count_up":
        answer = tuple(str(number) for number in range(numbers[0], numbers[1] + 1))
    elif task == "count_down":
        answer = tuple(str(number) for number in range(numbers[0], numbers[1] - 1, -1))
    elif task == "reverse":
        answer = words[::-1]
    else:
        answer = tuple(word for word in words if word in CATEGORIES[instruction.category])
    return Demand(len(answer), answer, task not in ("repeat", "keep"), instruction.ending)


def followed_rules(instruction: Instruction, response: str) -> dict[str, bool]:
    """Which of the instruction's rules a response follows, by the rule's name.

    - `complete`: at least as many permitted words as asked for;
    - `nothing_else`: no other words, none more often than asked for, and no more of them than asked for;
    - `order` (where one is asked for): the permitted words come in that order, and there is at least one;
    - `ending` (where one is asked for): it is the last word.

    Pleasantries and words of `ENDINGS` are not counted as words of the answer.
    """
    asked, given = demand(instruction), response.split()
    body = [word for word in given if word not in PLEASANTRIES and word not in ENDINGS]
    permitted, used = Counter(asked.permitted), Counter(body)
    rules = {
        "complete": (used & permitted).total() >= asked.number,
        "nothing_else": used <= permitted and 0 < len(body) <= asked.number,
    }
    if asked.ordered:
        ranks = [asked.permitted.index(word) for word in body if word in asked.permitted]
        rules["order"] = bool(ranks) and ranks == sorted(ranks)
    if asked.ending:
        rules["ending"] = given[-1:] == [asked.ending]
    return rules


def gold_reward(instruction: Instruction, response: str) -> float:
    """The share of rules followed, less a mild penalty for length and repetition; between -0.5 and 1.

    Every word beyond the number that a right answer needs costs 0.05, and so does every repetition of a word that was
    not asked for; together they cost at most 0.5. Any text can be scored; an empty one gets 0.
    """
    asked, given = demand(instruction), response.split()
    rules = followed_rules(instruction, response)
    extra = max(0, len(given) - asked.number - (asked.ending is not None))
    wanted = Counter(asked.permitted)
    repeated = sum(max(0, count - max(1, wanted[word])) for word, count in Counter(given).items())
    penalty = EXTRA_WORD_PENALTY * extra + REPEATED_WORD_PENALTY * repeated
    return sum(rules.values()) / len(rules) - min(penalty, LARGEST_PENALTY)


def gold_score(instruction: str, response: str) -> float:
    """The gold reward of a response to an instruction, both as texts.

    Raises:
        ValueError: if the instruction is not one of the embedded world.
    """
    return gold_reward(parse_instruction(instruction), response)


def follows_every_rule(instruction: str, response: str) -> bool:
    """Whether a response does all that the instruction asks for, however many words it takes."""
    return all(followed_rules(parse_instruction(instruction), response).values())


def right_answer(instruction: Instruction, generator: random.Random) -> str:
    """A response of gold reward 1; where several exist, `generator` chooses."""
    asked = demand(instruction)
    chosen = sorted(generator.sample(range(len(asked.permitted)), asked.number))
    if not asked.ordered:
        generator.shuffle(chosen)
    words = [asked.permitted[index] for index in chosen]
    return " ".join(words + [asked.ending] if asked.ending else words)


_PAD, _BOS, _EOS, _UNKNOWN, _USER, _ASSISTANT = _SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")

# One BOS, then each turn behind its role token; EOS ends the assistant's turns, and the next role token the user's.
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant> ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the embedded world knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with a chat template; a word outside of the world becomes `<unk>`."""
    template_words = {
        word for text in (*TEMPLATES.values(), _ENDING_REQUEST) for word in text.split() if "{" not in word
    }
    words = {*template_words, *CATEGORIES, *CONTENT_WORDS, *NUMBERS, *ENDINGS, *PLEASANTRIES}
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *sorted(words)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        additional_special_tokens=[_USER, _ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
