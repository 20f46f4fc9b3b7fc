"""Prompts as the model reads them, against the prompts that it was trained on; both through the real preparation."""

import json

import pytest

from epsdpo.data.prepared import DataError, prepare
from epsdpo.data.rendering import read_training_prompts, render_prompts
from epsdpo.experiment import DataSection
from epsdpo.world.language import build_tokenizer

SYSTEM = {"role": "system", "content": "blue red"}
# As the world's template, with a place for a system turn.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }} "
    "{% else %}{{ '<user> ' if message['role'] == 'user' else '<assistant> ' }}{{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def pairs_of(prompts):
    words = {"chosen": "blue", "rejected": "red"}
    if isinstance(prompts[0], str):
        return [{"prompt": prompt, **words} for prompt in prompts]
    answers = {side: [{"role": "assistant", "content": word}] for side, word in words.items()}
    return [{"prompt": prompt, **answers} for prompt in prompts]


@pytest.fixture
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def trained_on(tmp_path, tokenizer):
    """The training prompts of a folder that was prepared from these prompts."""

    def prepare_and_read(prompts, tokenizer=tokenizer, max_prompt_length=None):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in pairs_of(prompts)), encoding="utf-8")
        section = DataSection(source=str(path), max_prompt_length=max_prompt_length)
        prepare(section, tokenizer, tmp_path / "data", max_length=None)
        return read_training_prompts(tmp_path / "data")

    return prepare_and_read


def test_prompts_are_rendered_as_training_rendered_them(trained_on, tokenizer):
    conversations = [
        [user("count up from 3 to 7")],
        [user("cat"), {"role": "assistant", "content": "fig"}, user("oak")],
    ]
    training = trained_on(conversations)
    rendered = render_prompts(conversations, tokenizer, training)
    assert [prompt.token_ids for prompt in rendered] == training.token_ids
    assert [prompt.text for prompt in rendered] == training.texts
    assert [prompt.bos for prompt in rendered] == [1, 1]


def test_a_template_that_changed_since_training_is_refused_with_both(trained_on, tokenizer):
    training = trained_on([[user("cat")]])
    tokenizer.chat_template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant> yes{% endif %}")
    with pytest.raises(DataError) as error:
        render_prompts([[user("cat")]], tokenizer, training)
    assert "'<bos><user> cat <assistant> yes'" in str(error.value) and "'<bos><user> cat <assistant>'" in str(
        error.value
    )


def test_bos_that_training_did_not_have_is_refused_with_both_counts(trained_on, tokenizer):
    without = build_tokenizer()
    without.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    training = trained_on([[user("cat")]], without)
    assert training.bos == 0
    with pytest.raises(DataError, match="starts with 1 BOS, and training's with 0"):
        render_prompts([[user("cat")]], tokenizer, training)


def test_a_second_bos_is_refused(trained_on, tokenizer):
    training = trained_on([[user("cat")]])
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    with pytest.raises(DataError, match="starts with 2 BOS, and training's with 1"):
        render_prompts([[user("cat")]], tokenizer, training)


def test_a_system_turn_must_be_one_that_training_had(trained_on, tokenizer):
    training = trained_on([[SYSTEM, user("cat")], [user("oak")]])
    assert len(render_prompts([[SYSTEM, user("fig")], [user("fig")]], tokenizer, training)) == 2
    with pytest.raises(DataError, match="as no training prompt is"):
        render_prompts([[{**SYSTEM, "content": "red"}, user("fig")]], tokenizer, training)
    only_system = trained_on([[SYSTEM, user("cat")]])
    with pytest.raises(DataError, match="as no training prompt is"):
        render_prompts([[user("fig")]], tokenizer, only_system)


def test_training_prompts_that_were_cut_are_known_again(trained_on, tokenizer):
    training = trained_on([[user("count up from 3 to 7")], [user("cat")]], max_prompt_length=4)
    assert [len(ids) for ids in training.token_ids] == [4, 4]
    (prompt,) = render_prompts([[user("count up from 3 to 7")]], tokenizer, training)
    assert len(prompt.token_ids) > 4 and prompt.bos == 1


def test_a_tokenizer_that_changed_since_training_is_refused(trained_on, tokenizer):
    training = trained_on([[user("cat")]])
    other = type(training)(
        **{**vars(training), "token_ids": [[ids[0], *[7] * (len(ids) - 1)] for ids in training.token_ids]}
    )
    with pytest.raises(DataError, match="other tokens"):
        render_prompts([[user("cat")]], tokenizer, other)


def test_plain_text_stays_plain(trained_on, tokenizer):
    training = trained_on(["count up from 3 to 7 ", "cat "])
    rendered = render_prompts([[user("count up from 3 to 7 ")]], tokenizer, training)
    assert rendered[0].text == "count up from 3 to 7 " and rendered[0].token_ids == training.token_ids[0]
    with pytest.raises(DataError, match="2 turns, but the model was trained on plain text"):
        render_prompts([[SYSTEM, user("cat")]], tokenizer, training)


def test_a_conversation_that_the_template_refuses_is_named(trained_on, tokenizer):
    training = trained_on([[user("cat")]])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses the turns user, user: roles must alternate"):
        render_prompts([[user("a"), user("b")]], tokenizer, training)


def test_data_that_were_not_prepared(tmp_path):
    with pytest.raises(DataError, match=r"report.json: not there; run the prepare stage"):
        read_training_prompts(tmp_path)
