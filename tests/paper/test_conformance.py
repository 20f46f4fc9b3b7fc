"""The test for everybody's ε-DPO: its vectors against plain formulas, and what it says of good and bad trainers."""

import logging
import math
from dataclasses import replace

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from kit import plain_epsilon_dpo as plain

from epsdpo.__main__ import main
from epsdpo.paper.conformance.clauses import BROKEN, HOLDS, NOT_ASKED, Examination
from epsdpo.paper.conformance.observed import Setting, train
from epsdpo.paper.conformance.subject import load_subject
from epsdpo.paper.conformance.vectors import CRITERION, TRAINING, model_of, read_vectors, tokenizer_of

TEXTS = ("prompt", "chosen", "rejected")
KITS, PLAIN = "epsdpo:EpsilonDPOTrainer", "kit.plain_epsilon_dpo:PlainTrainer"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    level, package = transformers.logging.get_verbosity(), logging.getLogger("epsdpo")
    levels, package.level = (level, package.level), logging.ERROR
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(levels[0])
    package.level = levels[1]
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def vectors():
    return read_vectors()


@pytest.fixture
def examine(vectors, tmp_path):
    def examination(name, **changes):
        return Examination(replace(load_subject(name), **changes), vectors, tmp_path)

    return examination


# ------------------------------------------------------------------------------------------------------ the vectors


def log_ratios(z, r, masks, labels, epsilon):
    """Chosen less rejected under z, z + ε(z - r) and z - ε(z - r), and z's less r's: three whole softmaxes and one."""

    def ratio(*logits):
        sums = [
            (each.log_softmax(-1).gather(1, label[:, None])[:, 0] * mask).sum()
            for each, label, mask in zip(logits, labels, masks, strict=True)
        ]
        return sums[0] - sums[1]

    difference = [policy - reference for policy, reference in zip(z, r, strict=True)]
    perturbed = [
        ratio(*(each + way * epsilon * apart for each, apart in zip(z, difference, strict=True))) for way in (0, 1, -1)
    ]
    return torch.stack(perturbed), ratio(*z) - ratio(*r)


def decision_of(current, lowered, raised):
    """Eq. 5 as it stands in the paper."""
    if lowered > current > raised:
        return 1
    return -1 if lowered < current < raised else 0


def assert_expected(expected, pair, ratios, margin, epsilon, beta):
    decision = decision_of(*ratios.tolist())
    tilde = {1: beta / (1 + epsilon), 0: beta, -1: beta / (1 - epsilon)}[decision]
    assert expected["decision"][pair] == decision
    assert expected["log_ratio"][pair] == pytest.approx(ratios.tolist(), abs=1e-12)
    assert expected["margin"][pair] == pytest.approx(margin.item(), abs=1e-12)
    assert expected["beta_tilde"][pair] == pytest.approx(tilde, rel=1e-14)
    sigmoid = 1 / (1 + math.exp(-tilde * margin.item()))
    assert expected["loss"][pair] == pytest.approx(-math.log(sigmoid), rel=1e-12)
    assert expected["loss_by_margin"][pair] == pytest.approx(-tilde * (1 - sigmoid), rel=1e-12)


def test_the_criterion_is_that_of_three_whole_softmaxes():
    criterion = read_vectors(CRITERION)
    beta, epsilon = criterion["arguments"]["beta"], criterion["arguments"]["epsilon"]
    for pair, sides in enumerate(criterion["pairs"]):
        z, r, labels, masks = (
            [torch.tensor(sides[side][name], dtype=dtype) for side in ("chosen", "rejected")]
            for name, dtype in (
                ("policy", torch.float64),
                ("reference", torch.float64),
                ("labels", torch.int64),
                ("mask", torch.float64),
            )
        )
        assert 0 < masks[0].sum() < len(masks[0])  # a prompt's tokens do not count
        ratios, margin = log_ratios(z, r, masks, labels, epsilon)
        assert_expected(criterion, pair, ratios, margin, epsilon, beta)
    assert set(criterion["decision"]) == {1, 0, -1}


def scored(policy, reference, pair, epsilon):
    """A pair of the training under two models."""
    ids = [torch.tensor(pair["prompt_ids"] + pair[side]) for side in ("chosen_ids", "rejected_ids")]
    labels = [each[1:] for each in ids]
    masks = [(torch.arange(len(each)) >= len(pair["prompt_ids"]) - 1).double() for each in labels]
    z, r = ([model(each[None]).logits[0, :-1] for each in ids] for model in (policy, reference))
    return log_ratios(z, [each.detach() for each in r], masks, labels, epsilon)


@pytest.mark.parametrize("rule", ["mean_step", "mean_beta"])
def test_the_path_is_that_of_plain_gradient_descent(vectors, rule):
    policy, reference = (model_of(vectors, role, torch.float64) for role in ("policy", "reference"))
    given, path = vectors["arguments"], vectors["paths"][rule]
    beta, epsilon = given["beta"], given["epsilon"]
    for step in range(6):
        batch = vectors["pairs"][6 * (step % 2) : 6 * (step % 2) + 6]
        found = [scored(policy, reference, pair, epsilon) for pair in batch]
        decisions = [decision_of(*ratios.tolist()) for ratios, _ in found]
        tilde = [{1: beta / (1 + epsilon), 0: beta, -1: beta / (1 - epsilon)}[decision] for decision in decisions]
        loss = sum(-F.logsigmoid(b * margin) for b, (_, margin) in zip(tilde, found, strict=True)) / 6
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(policy.parameters(), gradients, strict=True):
                weight -= given["learning_rate"] * gradient
        if step == 0:
            for name, weight in policy.state_dict().items():
                expected = torch.tensor(vectors["weights_after_first_step"][name], dtype=torch.float64)
                torch.testing.assert_close(weight, expected, rtol=0, atol=1e-9)
        assert path["decision"][step] == decisions
        assert path["loss"][step] == pytest.approx(loss.item(), abs=1e-8)
        assert path["beta"][step] == pytest.approx(beta, rel=1e-14)
        beta = sum(tilde) / 6 if rule == "mean_beta" else beta / (1 + epsilon * sum(decisions) / 6)
    assert path["beta"][6] == pytest.approx(beta, rel=1e-14)


def test_one_by_one_is_of_all_pairs(vectors):
    models = [model_of(vectors, role, torch.float64) for role in ("policy", "reference")]
    given = vectors["arguments"]
    for pair, texts in enumerate(vectors["pairs"]):
        ratios, margin = scored(*models, texts, given["epsilon"])
        assert_expected(vectors["one_by_one"], pair, ratios.detach(), margin, given["epsilon"], given["beta"])


def test_texts_become_the_token_ids(vectors, tmp_path):
    """By TRL's own preparation, which appends the end."""
    arguments = plain.PlainConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    data = datasets.Dataset.from_list([{name: pair[name] for name in TEXTS} for pair in vectors["pairs"]])
    models = [model_of(vectors, role) for role in ("policy", "reference")]
    trainer = plain.PlainTrainer(*models, arguments, train_dataset=data, processing_class=tokenizer_of(vectors))
    for pair, row in zip(vectors["pairs"], trainer.train_dataset, strict=True):
        assert {name: row[f"{name}_ids"] for name in TEXTS} == {name: pair[f"{name}_ids"] for name in TEXTS}


def test_weights_are_exact_in_bfloat16_and_the_files_are_small(vectors):
    for role in ("policy", "reference"):
        narrow, wide = (model_of(vectors, role, dtype).state_dict() for dtype in (torch.bfloat16, torch.float64))
        assert all(narrow[name].double().equal(weight) for name, weight in wide.items())
    assert TRAINING.stat().st_size + CRITERION.stat().st_size < 200_000


# ------------------------------------------------------------------------------------------------------ the clauses


@pytest.mark.parametrize("name, ties", [(KITS, 0), (PLAIN, 9)])
def test_a_right_trainer_breaks_no_clause(examine, name, ties):
    """This kit's decides exactly of models in bfloat16, and three softmaxes of such logits see ties everywhere."""
    answers = {answer.clause: answer for answer in examine(name).answers()}
    assert len(answers) == 10 and {answer.verdict for answer in answers.values()} == {HOLDS}
    assert "mean step), the released code's" in answers["β over steps"].detail
    assert f" {ties} of 9 pairs" in answers["ties"].detail
    assert "is refused: ValueError" in answers["precomputed reference"].detail


def test_the_other_rule_is_named(examine):
    answers = {answer.clause: answer for answer in examine(KITS, args={"beta_update": "mean_beta"}).answers()}
    assert {answer.verdict for answer in answers.values()} == {HOLDS}
    assert answers["β over steps"].detail.startswith("the mean of β̃, Algorithm 1's")


# Mutant -> the clause that it breaks, and what is said of it.
MUTANTS = {
    "ConstantBeta": ("β over steps", "step 1: expected β after it"),
    "PerturbedPolicyInLoss": ("loss of a batch", "the perturbed policy of Eqs. 3 and 4"),
    "DPOWhenPrecomputed": ("precomputed reference", "it is plain DPO's"),
    "MeanStepInBfloat16": ("β over steps", "of 6 pairs: β went from 0.2 to "),
    "BetaLostOnResume": ("resuming", "before it of 0.15873016, found 0.2"),
    "EvaluationMovesBeta": ("evaluation", "step 1: expected β after it"),
    "FullWindowAlways": ("short last window", "step 2: expected β after it"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_breaks_its_clause_and_no_other(examine, name):
    clause, says = MUTANTS[name]
    answers = {answer.clause: answer for answer in examine(f"kit.plain_epsilon_dpo:{name}").answers()}
    assert [found for found, answer in answers.items() if answer.verdict == BROKEN] == [clause]
    assert says in answers[clause].detail


# Likewise, of the first clause that is broken.
MORE_MUTANTS = {
    "NoTies": ("decisions", "expected β (a tie), found β"),
    "OtherBetas": ("β̃ of a pair", "expected β/(1 - ε) = 1.42857·β, found 1.3·β"),
    "GradientOfPerturbedPolicy": ("loss of a batch", "the loss is right and its gradient is not"),
    "MeanStepInTheLogitsDtype": ("β over steps", "of 3 pairs: β went from"),
    "LastMicroBatchAlone": ("accumulation", "step 1: expected β after it"),
    "EqualIsMore": ("ties", "policy and reference are equal"),
}


@pytest.mark.parametrize("name", MORE_MUTANTS)
def test_subtler_mutants(examine, name):
    answers = examine(f"kit.plain_epsilon_dpo:{name}").answers()
    broken = next(answer for answer in answers if answer.verdict == BROKEN)
    assert broken.clause == MORE_MUTANTS[name][0]
    assert MORE_MUTANTS[name][1] in broken.detail


def test_a_beta_that_is_not_seen_is_read_from_the_losses(examine):
    """`args.beta` stays what it was."""
    answers = {answer.clause: answer for answer in examine(KITS, beta="args.beta").answers()}
    assert [clause for clause, answer in answers.items() if answer.verdict != HOLDS] == ["ties"]
    assert answers["ties"].verdict == NOT_ASKED and "'args.beta'; name it by `beta`" in answers["ties"].detail
    assert "losses over 6 steps" in answers["β over steps"].detail


def test_what_a_trainer_raises_is_an_answer(examine):
    examination = examine(PLAIN)
    examination.subject = replace(examination.subject, args={"eval_strategy": "sometimes"})
    answer = examination.ask("evaluation", "", examination.evaluation)
    assert answer.verdict == NOT_ASKED and "the training failed: ValueError: sometimes is not" in answer.detail


def test_a_run_is_seen_step_by_step(vectors, tmp_path):
    run = train(load_subject(PLAIN), vectors, Setting(range(5), 2, learning_rate=0.02), tmp_path)
    assert list(run.loss) == [1, 2, 3] and list(run.beta) == list(run.weights) == [1, 2, 3, 4]
    assert not run.weights[1]["lm_head.weight"].equal(run.weights[2]["lm_head.weight"])


# ------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    "name, says",
    [
        ("kit.plain_epsilon_dpo", "is not MODULE:CLASS"),
        ("kit.nowhere:Trainer", "there is no module 'kit.nowhere'"),
        ("kit.plain_epsilon_dpo:Trainer", "has no class 'Trainer'. It has "),
        ("transformers:TrainerCallback", "Give args_class: MODULE:CLASS"),
        ("trl:DPOTrainer", "unexpected keyword argument 'epsilon'"),
    ],
)
def test_bad_use_is_refused_with_what_to_do(capsys, name, says):
    assert main(["conform", name]) == 2
    assert says in capsys.readouterr().err


def test_a_config_that_is_not_there_is_refused(capsys, tmp_path):
    assert main(["conform", PLAIN, "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "No such file or directory. --config is the path of a YAML file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, says",
    [
        ("eps: epsilon\n", "eps is none of its keys. It may have args_class, epsilon, beta, args"),
        ("- epsilon\n", "list is none of its keys"),
        ("epsilon: 0.01\n", "epsilon is 0.01. Give it a name"),
        ("args: [1]\n", "args is [1]. Give it names and values"),
        ("args_class: kit.plain_epsilon_dpo:Nothing\n", "args_class: kit.plain_epsilon_dpo has no class 'Nothing'"),
        ("beta: [\n", "is no YAML"),
    ],
)
def test_a_config_says_what_is_wrong_with_it(capsys, tmp_path, text, says):
    config = tmp_path / "mine.yaml"
    config.write_text(text, encoding="utf-8")
    assert main(["conform", PLAIN, "--config", str(config)]) == 2
    assert says in capsys.readouterr().err
