"""The embedded world: its language and gold reward by hand-made cases, and a tiny world built end to end."""

import random
from collections import Counter

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from epsdpo.experiment import WorldSection
from epsdpo.world.build import (
    Instruction,
    SftSettings,
    build_tokenizer,
    evaluation_prompts,
    followed_rules,
    gold_reward,
    parse_instruction,
    preference_pairs,
    reference_model_dir,
    render,
    sample_instructions,
)
from epsdpo.world.language import CONTENT_WORDS, SPLITS, TASKS, right_answer
from epsdpo.world.model import demonstrate, encode_prompts

SETTINGS = WorldSection(train_pairs=48, eval_pairs=12, prompts=9)
TINY = SftSettings(hidden_size=32, layers=1, heads=2, steps=40, batch_size=16)

SORTED = Instruction("name_sorted", (2,), "fruits", ("fig",), "done")  # rules: complete, nothing_else, order, ending
COUNT = Instruction("count_down", (5, 3))  # rules: complete, nothing_else, order
KEEP = Instruction("keep", (), "animals", ("dog", "pear", "cat"))  # rules: complete, nothing_else


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """The cache folder of a tiny world, with its model and training pairs built."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPSDPO_CACHE", str(folder))
        preference_pairs(SETTINGS, "train", TINY)
        yield folder


@pytest.mark.parametrize("split", SPLITS)
def test_parse_inverts_render(split):
    sampled = sample_instructions(400, 7, split)
    assert {instruction.task for instruction in sampled} == set(TASKS)
    assert [parse_instruction(render(instruction)) for instruction in sampled] == sampled


def test_render_by_hand():
    assert render(SORTED) == "name 2 fruits in alphabetical order but not fig and end with done"
    assert render(COUNT) == "count down from 5 to 3"
    assert render(KEEP) == "keep only the animals among dog pear cat"


@pytest.mark.parametrize(
    "text", ["", "name 3 fruits", "count down from 05 to 3", "count down from 5 to 3 ", "repeat the word <b> 3 times"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not an instruction of the embedded world"):
        parse_instruction(text)


@pytest.mark.parametrize(
    ("instruction", "response", "gold"),
    [
        (SORTED, "apple pear done", 1.0),
        (SORTED, "apple done", 3 / 4),  # not complete
        (SORTED, "apple cedar pear done", 3 / 4 - 0.05),  # something else, and one word too many
        (SORTED, "apple fig done", 2 / 4),  # the one that was not wanted, so not complete either
        (SORTED, "pear apple done", 3 / 4),  # order
        (SORTED, "apple pear", 3 / 4),  # ending
        (SORTED, "apple pear bye", 3 / 4),  # the wrong ending
        (SORTED, "apple apple done", 2 / 4 - 0.05),  # one fruit twice: too few, too often, and repeated
        (SORTED, "sure here you are apple pear done", 1.0 - 4 * 0.05),
        (SORTED, "apple pear done have a nice day", 3 / 4 - 4 * 0.05),
        (COUNT, "5 4 3", 1.0),
        (COUNT, "3 4 5", 2 / 3),
        (COUNT, "5 4 3 2", 2 / 3 - 0.05),
        (COUNT, "5 4", 2 / 3),
        (KEEP, "cat dog", 1.0),
        (KEEP, "dog pear cat", 1 / 2 - 0.05),
        (KEEP, "bear lion", 0.0),
        (KEEP, "", 0.0),
        (KEEP, "</script> ' OR 1=1 \x00 🦊", 0.0 - 4 * 0.05),  # six words where two were asked for
        (KEEP, "dog " * 5000, -0.5),  # penalties are capped
        (Instruction("repeat", (3,), words=("oak",)), "oak oak oak", 1.0),
        (Instruction("repeat", (3,), words=("oak",)), "oak oak oak oak", 1 / 2 - 0.10),  # extra, and repeated
        (Instruction("reverse", words=("oak", "fig", "cat")), "cat fig oak", 1.0),
        (Instruction("name", (2,), "fruits", ("fig",)), "pear apple lemon", 1 / 2 - 0.05),  # three instead of two
    ],
)
def test_gold_reward_by_hand(instruction, response, gold):
    assert gold_reward(instruction, response) == pytest.approx(gold)


def test_rules_are_named():
    assert followed_rules(SORTED, "pear apple") == {
        "complete": True,
        "nothing_else": True,
        "order": False,
        "ending": False,
    }


def test_right_answers_earn_everything_and_longer_ones_less():
    generator = random.Random(0)
    for instruction in sample_instructions(300, 1, "eval"):
        answer = right_answer(instruction, generator)
        assert gold_reward(instruction, answer) == 1.0
        assert gold_reward(instruction, "of course " + answer) == pytest.approx(0.9)


def test_demonstrations_are_of_mixed_quality():
    generator = random.Random(0)
    shown = sample_instructions(600, 2, "demonstrations")
    golds = [gold_reward(instruction, demonstrate(instruction, SftSettings(), generator)) for instruction in shown]
    assert 0.45 < sum(gold == 1.0 for gold in golds) / len(golds) < 0.75


def test_splits_share_no_text_whatever_the_seeds():
    texts = [{render(i) for i in sample_instructions(1500, seed, split)} for seed, split in enumerate(SPLITS)]
    assert sum(map(len, texts)) == len(set().union(*texts)) == 1500 * len(SPLITS)


def test_a_seed_decides_the_instructions_and_a_larger_sample_begins_with_the_smaller():
    assert sample_instructions(200, 3, "train")[:50] == sample_instructions(50, 3, "train")
    assert sample_instructions(50, 3, "train") != sample_instructions(50, 4, "train")


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split 'test' is unknown; the world has demonstrations, train"):
        sample_instructions(1, 0, "test")


def test_the_language_is_closed_and_prompt_is_a_token_prefix():
    tokenizer = build_tokenizer()
    generator = random.Random(0)
    for instruction in sample_instructions(200, 5, "prompts"):
        question = {"role": "user", "content": render(instruction)}
        answer = demonstrate(instruction, SftSettings(), generator)
        chat = [question, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(chat)["input_ids"]
        assert Counter(whole)[tokenizer.bos_token_id] == 1
        assert tokenizer.unk_token_id not in whole
        assert whole[: len(prompt)] == prompt == encode_prompts(tokenizer, [render(instruction)])[0]
        assert whole[-1] == tokenizer.eos_token_id
        assert Counter(whole)[tokenizer.eos_token_id] == 1
        assert tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True) == answer


def test_unknown_words_and_roles():
    tokenizer = build_tokenizer()
    assert tokenizer("dog zebra")["input_ids"][1] == tokenizer.unk_token_id
    with pytest.raises(Exception, match="roles user and assistant only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "dog"}])


def test_the_cached_model_loads_with_its_tokenizer(tiny_world):
    folder = reference_model_dir(SETTINGS, TINY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": render(KEEP)}]
    assert folder.parent == tiny_world
    assert tokenizer.apply_chat_template(chat) == build_tokenizer().apply_chat_template(chat)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_pairs_are_the_models_own_words_and_prefer_gold(tiny_world):
    pairs = preference_pairs(SETTINGS, "train", TINY)
    assert list(pairs.pair_id) == [f"train-{index}" for index in range(48)]
    assert pairs.attrs["instructions_without_a_pair"] >= 0
    for row in pairs.itertuples():
        instruction = parse_instruction(row.prompt[0]["content"])
        chosen, rejected = row.chosen[0]["content"], row.rejected[0]["content"]
        assert chosen != rejected
        assert row.task == instruction.task
        assert (row.chosen_gold, row.rejected_gold) == (
            gold_reward(instruction, chosen),
            gold_reward(instruction, rejected),
        )
    assert (pairs.chosen_gold > pairs.rejected_gold).sum() > 2 * (pairs.chosen_gold < pairs.rejected_gold).sum()
    assert set(CONTENT_WORDS) & set(" ".join(row[0]["content"] for row in pairs.chosen).split())


def test_noise_of_the_label_follows_its_temperature(tiny_world):
    hot = preference_pairs(SETTINGS.model_copy(update={"label_temperature": 100.0}), "train", TINY)
    cold = preference_pairs(SETTINGS.model_copy(update={"label_temperature": 1e-6}), "train", TINY)
    assert (cold.chosen_gold >= cold.rejected_gold).all()
    assert (hot.chosen_gold < hot.rejected_gold).mean() > 0.2


def test_cache_hit_builds_nothing(tiny_world):
    before = {path: path.stat().st_mtime_ns for path in tiny_world.rglob("*")}
    reference_model_dir(SETTINGS, TINY)
    preference_pairs(SETTINGS, "train", TINY)
    assert {path: path.stat().st_mtime_ns for path in tiny_world.rglob("*")} == before


def test_same_seed_same_world_and_another_seed_another(tiny_world, tmp_path, monkeypatch):
    here = preference_pairs(SETTINGS, "train", TINY)
    monkeypatch.setenv("EPSDPO_CACHE", str(tmp_path))
    pd.testing.assert_frame_equal(preference_pairs(SETTINGS, "train", TINY), here)
    other = preference_pairs(SETTINGS.model_copy(update={"seed": 1}), "train", TINY)
    assert [row[0]["content"] for row in other.prompt] != [row[0]["content"] for row in here.prompt]


@pytest.mark.parametrize("damage", ["truncated file", "missing file", "no checksums"])
def test_a_damaged_cache_is_built_again(tiny_world, damage, caplog):
    folder = reference_model_dir(SETTINGS, TINY)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated file":
        weights.write_bytes(whole[: len(whole) // 2])
    elif damage == "missing file":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "checksums.json").unlink()
    assert reference_model_dir(SETTINGS, TINY) == folder
    assert "is damaged and was built again" in caplog.text
    assert weights.read_bytes() == whole
    assert not [path for path in tiny_world.iterdir() if path.name.startswith(".")]


def test_a_build_that_dies_leaves_nothing_to_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("EPSDPO_CACHE", str(tmp_path))
    monkeypatch.setattr("epsdpo.world.build.train_reference", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        reference_model_dir(SETTINGS, TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_second_builder_that_comes_first_is_believed(tiny_world, tmp_path, monkeypatch):
    """Two processes race: the slower one finds the folder there when it has finished, and uses it."""
    import epsdpo.world.build as world

    monkeypatch.setenv("EPSDPO_CACHE", str(tmp_path))
    train, nested = world.train_reference, []

    def overtaken(*arguments):
        if not nested:
            nested.append(True)
            nested.append(reference_model_dir(SETTINGS, TINY))
        return train(*arguments)

    monkeypatch.setattr(world, "train_reference", overtaken)
    assert reference_model_dir(SETTINGS, TINY) == nested[1]
    assert [path.name for path in tmp_path.iterdir()] == [nested[1].name]


def test_evaluation_prompts():
    prompts = evaluation_prompts(SETTINGS)
    assert list(prompts.columns) == ["prompt_id", "prompt", "instruction", "task"]
    assert prompts.prompt_id.is_unique and prompts.instruction.is_unique and len(prompts) == 9
    for row in prompts.itertuples():
        assert row.prompt == [{"role": "user", "content": row.instruction}]
        assert parse_instruction(row.instruction).task == row.task
