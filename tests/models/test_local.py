"""Generation on a tiny random Llama: greedy against a plain loop, sampling frequencies, seeds, order and end tokens."""

import copy

import numpy as np
import pytest
import torch
from kit.tiny_generation import generate_responses, tiny_model

from epsdpo.experiment import EvaluateSection
from epsdpo.world.language import build_tokenizer

GREEDY = EvaluateSection(temperature=0.0, max_new_tokens=12, batch_size=3)
SAMPLED = EvaluateSection(temperature=1.0, max_new_tokens=12, batch_size=3)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ["count up from 3 to 7", "repeat the word blue 3 times", "count down from 9 to 5 and end with bye", "cat"]
    texts += ["write the words oak fig cat backwards", "name 3 fruits but not apple"]
    return [tokenizer(f"<bos><user> {text} <assistant>", add_special_tokens=False)["input_ids"] for text in texts]


@torch.no_grad()
def greedy_by_hand(model, prompt, max_new_tokens, ends):
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_greedy_equals_a_plain_argmax_loop(model, tokenizer, prompts):
    responses = generate_responses(model, tokenizer, prompts, GREEDY, seed=0)
    expected = [greedy_by_hand(model, prompt, 12, {tokenizer.eos_token_id}) for prompt in prompts]
    assert [response.token_ids for response in responses] == expected
    assert [response.text for response in responses] == [tokenizer.decode(ids, True) for ids in expected]


def test_a_response_ends_with_its_first_end_token(model, tokenizer, prompts):
    cut = greedy_by_hand(model, prompts[0], 12, set())
    original = model.generation_config.eos_token_id
    # A model with several end tokens, one of which is greedy's third token after the first prompt.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, cut[2]]
    try:
        responses = generate_responses(model, tokenizer, prompts, GREEDY, seed=0)
    finally:
        model.generation_config.eos_token_id = original
    ends = {tokenizer.eos_token_id, cut[2]}
    for response, prompt in zip(responses, prompts, strict=True):
        assert response.token_ids == greedy_by_hand(model, prompt, 12, ends)
        assert response.finished == (response.token_ids[-1] in ends)
        assert response.finished or len(response.token_ids) == 12
    assert len(responses[0].token_ids) <= 3 and responses[0].finished


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_models_own_sampling_settings_are_not_used(model, tokenizer, prompts, settings):
    expected = generate_responses(model, tokenizer, prompts, settings, seed=0)
    other = copy.deepcopy(model)
    other.generation_config.update(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=9.0, num_beams=2, max_length=20
    )
    assert generate_responses(other, tokenizer, prompts, settings, seed=0) == expected


def test_same_seed_same_responses_other_seed_others(model, tokenizer, prompts):
    first = generate_responses(model, tokenizer, prompts, SAMPLED, seed=1)
    torch.manual_seed(123)  # the global stream must not matter
    assert generate_responses(model, tokenizer, prompts, SAMPLED, seed=1) == first
    assert generate_responses(model, tokenizer, prompts, SAMPLED, seed=2) != first


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_responses_follow_their_prompts_through_a_shuffle(model, tokenizer, prompts, settings):
    responses = generate_responses(model, tokenizer, prompts, settings, seed=1)
    order = [4, 2, 5, 0, 3, 1]
    shuffled = generate_responses(model, tokenizer, [prompts[index] for index in order], settings, seed=1)
    assert shuffled == [responses[index] for index in order]


def test_the_same_prompts_make_the_same_batches_in_any_order(model, tokenizer):
    """Then not even rounding can differ; prompts of equal length are where an order could slip in."""
    texts = [f"repeat the word blue {count} times" for count in range(2, 9)]
    prompts = [tokenizer(f"<bos><user> {text} <assistant>", add_special_tokens=False)["input_ids"] for text in texts]

    def batches(prompts):
        seen = []
        hook = model.register_forward_pre_hook(
            lambda _, arguments, named: seen.append(named["input_ids"].tolist()), with_kwargs=True
        )
        generate_responses(model, tokenizer, prompts, SAMPLED, seed=1)
        hook.remove()
        return seen

    assert batches(prompts) == batches(prompts[::-1])


def test_responses_do_not_depend_on_company_or_batch_size(model, tokenizer, prompts):
    together = generate_responses(model, tokenizer, prompts, SAMPLED, seed=1)
    alone = [generate_responses(model, tokenizer, [prompt], SAMPLED, seed=1)[0] for prompt in prompts]
    assert alone == together


def sampled_first_tokens(model, tokenizer, prompt, settings, count):
    seeds = range(count)
    return [generate_responses(model, tokenizer, [prompt], settings, seed)[0].token_ids[0] for seed in seeds]


def test_samples_follow_the_tempered_distribution_within_the_nucleus(model, tokenizer, prompts):
    settings = EvaluateSection(temperature=0.7, top_p=0.8, max_new_tokens=1, batch_size=1)
    with torch.no_grad():
        probabilities = (model(torch.tensor([prompts[0]])).logits[0, -1].double() / 0.7).softmax(-1).numpy()
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), 0.8)) + 1
    nucleus = np.zeros_like(probabilities)
    nucleus[order[:size]] = probabilities[order[:size]] / probabilities[order[:size]].sum()
    assert size >= 3  # otherwise the test below says little

    counts = np.bincount(
        sampled_first_tokens(model, tokenizer, prompts[0], settings, 600), minlength=len(probabilities)
    )
    assert counts[nucleus == 0.0].sum() == 0
    standard_errors = np.sqrt(nucleus * (1.0 - nucleus) / 600)
    assert (np.abs(counts / 600 - nucleus) <= 4.0 * standard_errors + 1e-12).all()


def test_a_prompt_beyond_the_context_is_refused_before_work(model, tokenizer, prompts):
    long = prompts[0] * 10
    with pytest.raises(ValueError, match=rf"prompt 1 has {len(long)} tokens and max_new_tokens is 12.*ends at 64"):
        generate_responses(model, tokenizer, [prompts[0], long], GREEDY, seed=0)


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate_responses(model, tokenizer, [[]], GREEDY, seed=0)


def test_no_prompts_no_responses(model, tokenizer):
    assert generate_responses(model, tokenizer, [], GREEDY, seed=0) == []
