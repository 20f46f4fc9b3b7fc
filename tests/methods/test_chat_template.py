"""A chat template that writes today's date, as those of Llama 3.1 and later do: every text is the same on any day.

The calendar of transformers is set by hand; all else is real.
"""

import datetime as calendar
import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from kit import tiny_generation
from kit.official import OFFICIAL
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from transformers.utils import chat_template_utils

from epsdpo.__main__ import main
from epsdpo.batch.check.texts import check_rendering
from epsdpo.batch.specs import settings_of
from epsdpo.data.on_policy.rank import Answered, RewardModelRanker
from epsdpo.data.on_policy.sample import sample_pairs
from epsdpo.data.prepared import DataError, load_prepared, prepare
from epsdpo.data.sources import find_source, read_split
from epsdpo.evaluation.evaluate import evaluate
from epsdpo.evaluation.judge import load_judge
from epsdpo.evaluation.judges.comparison import Comparison, Presentation
from epsdpo.experiment import (
    ConfigError,
    DataSection,
    RankerSection,
    ServerSection,
    check_experiment,
    load_saved,
    save_experiment,
)
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.methods.chat_template import render_chat
from epsdpo.models.server import ServerEngine
from epsdpo.models.start import load_tokenizer
from epsdpo.runs.fingerprint import key_of, key_parts
from epsdpo.train.preferences import train
from epsdpo.train.sft import demonstrations

# As Llama 3.2's: the date is a variable of the template, and stands in the system turn.
TEMPLATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}"
    "{{- bos_token }}system: Today Date: {{ date_string }}\n"
    "{%- for message in messages %}{{- message['role'] }}: {{ message['content'] }}{{ eos_token }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)
DAY, LATER = calendar.date(2025, 3, 1), calendar.date(2025, 3, 2)


@pytest.fixture
def today(monkeypatch):
    """Set the date of transformers' clock."""

    def set_date(day):
        class Clock(calendar.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(day.year, day.month, day.day, 23, 59)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    set_date(DAY)
    return set_date


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def values(tmp_path, tokenizer):
    """A config of a run on the tiny model, with conversations and prompts in files."""
    AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in (OFFICIAL / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:8]]
    conversations = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in rows
    ]
    for name, table in (("pairs", conversations), ("prompts", [{"prompt": row["prompt"]} for row in rows[:3]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return {
        "name": "dated",
        "method": "epsilon_dpo",
        "data": {"source": str(tmp_path / "pairs.jsonl")},
        "model": {"name_or_path": str(tmp_path / "model")},
        "train": {
            "beta": 0.1,
            "learning_rate": 1.0e-3,
            "global_batch_size": 4,
            "per_device_train_batch_size": 4,
            "max_length": 256,
            "max_steps": 1,
            "bf16": False,
            "activation_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
        },
        "evaluate": {
            "prompts": {"source": str(tmp_path / "prompts.jsonl")},
            "judge": None,
            "max_new_tokens": 4,
            "bootstrap_samples": 20,
        },
    }


def experiment_of(values):
    return check_experiment(values, where="test")


def prepared_on(day, experiment, folder, today):
    today(day)
    return prepare(experiment.data, load_tokenizer(experiment), folder, max_length=256)


def test_a_run_whose_evaluation_is_after_midnight(values, tmp_path, today):
    """Prepared and trained on one day, evaluated on the next and again on the one after that: nothing is refused."""
    experiment = experiment_of(values)
    data = prepared_on(DAY, experiment, tmp_path / "data", today)
    assert data.report["template_date"] == "2024-07-26"
    assert "Today Date: 26 Jul 2024" in data.train[0]["prompt"]
    train(experiment, data, tmp_path / "train", callbacks=[])
    first = []
    for day in (LATER, calendar.date(2026, 1, 1)):
        today(day)
        results = evaluate(experiment, tmp_path / "data", tmp_path / "train", tmp_path / f"evaluate-{day}")
        assert "Today Date: 26 Jul 2024" in results.summary["prompts"]["first_as_rendered"]
        first.append(results.responses.drop(columns=["reverse_kl", "forward_kl"]).to_dict("records"))
    assert first[0] == first[1]


def test_the_same_key_holds_the_same_data_on_any_day(values, tmp_path, today):
    experiment = experiment_of(values)
    days = [prepared_on(day, experiment, tmp_path / str(day), today) for day in (DAY, LATER)]
    assert days[0].train.to_list() == days[1].train.to_list() and days[0].report == days[1].report
    assert demonstrations(days[0], 256).to_list() == demonstrations(days[1], 256).to_list()

    values["data"]["template_date"] = calendar.date(2025, 12, 9)  # as YAML reads 2025-12-09
    other = experiment_of(values)
    assert other.data.template_date == "2025-12-09"
    assert "Today Date: 09 Dec 2025" in prepared_on(DAY, other, tmp_path / "other", today).train[0]["prompt"]
    for stage in ("prepare", "sft", "sample"):
        one, two = (key_of(key_parts(settings_of(stage, each), {}, {})) for each in (experiment, other))
        assert one != two, stage


def test_the_day_is_kept_with_the_experiment(values, tmp_path):
    values["data"]["template_date"] = "20251209"
    save_experiment(experiment_of(values), tmp_path / "experiment.yaml")
    assert load_saved(tmp_path / "experiment.yaml").data.template_date == "2025-12-09"
    values["data"]["template_date"] = "9 December"
    with pytest.raises(ConfigError, match=r"data\.template_date: '9 December' is no day\. Write one as 2024-07-26"):
        experiment_of(values)


def test_evaluation_takes_the_day_of_the_prepared_data(values, tmp_path, today):
    """Also where the config has another by now: what the policy was trained on counts."""
    experiment = experiment_of({**values, "data": {**values["data"], "template_date": "2025-12-09"}})
    data = prepared_on(DAY, experiment, tmp_path / "data", today)
    train(experiment, data, tmp_path / "train", callbacks=[])
    results = evaluate(experiment_of(values), tmp_path / "data", tmp_path / "train", tmp_path / "evaluate")
    assert "Today Date: 09 Dec 2025" in results.summary["prompts"]["first_as_rendered"]


def test_sampled_pairs_were_asked_with_the_day_that_they_are_trained_with(values, tmp_path, today, tokenizer):
    reward = reward_model(tmp_path / "reward", tokenizer)
    values["data"] = {
        "source": "on_policy",
        "template_date": "2025-12-09",
        "on_policy": {
            "prompts": {"source": str(tmp_path / "prompts.jsonl")},
            "ranker": {"model": reward, "dtype": "float32"},
            "responses_per_prompt": 2,
            "max_new_tokens": 4,
        },
    }
    experiment = experiment_of(values)
    stored = []
    for day in (DAY, LATER):
        today(day)
        sample_pairs(experiment, tmp_path / str(day))
        lines = (tmp_path / str(day) / "generated.jsonl").read_text(encoding="utf-8").splitlines()
        stored.append([json.loads(line) for line in lines])
    assert stored[0] == stored[1]
    assert all("Today Date: 09 Dec 2025" in record["prompt"] for record in stored[0])


def test_check_names_the_day(values, tmp_path, capsys):
    config = tmp_path / "run.yaml"

    def checked():
        config.write_text(yaml.safe_dump({**values, "name": None} | {"name": "dated"}), encoding="utf-8")
        return main(["check", str(config)]), capsys.readouterr().out

    code, printed = checked()
    assert code == 0 and "chat template: it writes today's date, and is told 2024-07-26 on any day" in printed
    assert "Today Date: 26 Jul 2024" in printed
    values["data"]["template_date"] = "2025-12-09"
    assert "is told 2025-12-09 on any day (data.template_date)" in checked()[1]
    values["evaluate"]["judge"] = {"kind": "causal_lm", "model": values["model"]["name_or_path"]}
    assert "evaluate.judge: its chat template writes today's date, and is told 2024-07-26 always" in checked()[1]
    server = {"base_url": "http://localhost:1/v1", "policy": "a", "reference": "b", "endpoint": "chat"}
    values["evaluate"] |= {"engine": "server", "server": server}
    code, printed = checked()
    assert code == 2 and "error   evaluate.server.endpoint is 'chat', but the chat template writes today's" in printed
    asked = {"base_url": "http://localhost:1/v1", "model": "a", "endpoint": "chat"}
    ranked = {"ranker": {"model": values["model"]["name_or_path"]}, "prompts": {"source": str(config)}}
    values["data"] = {"source": "on_policy", "on_policy": {**ranked, "engine": "server", "server": asked}}
    assert "error   data.on_policy.server.endpoint is 'chat', but the chat template writes today's" in checked()[1]


def test_a_template_without_a_date_is_not_spoken_of(values, tmp_path, capsys, tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("strftime_now", "nothing")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["check", str(tmp_path / "run.yaml")]) == 0
    assert "today's date" not in capsys.readouterr().out


def test_a_server_renders_no_dates(tokenizer):
    settings = tiny_generation.SETTINGS
    server = ServerSection(base_url="http://localhost:1/v1", policy="a", reference="b", endpoint="chat")
    with pytest.raises(ConfigError, match="Use endpoint: completions"):
        ServerEngine(server, "a", tokenizer, settings, 0, {})
    ServerEngine(server.model_copy(update={"endpoint": "completions"}), "a", tokenizer, settings, 0, {})


@pytest.mark.parametrize("source", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_draws_at_random_is_refused(values, tmp_path, tokenizer, source):
    tokenizer.chat_template = TEMPLATE + source
    section = DataSection(**values["data"])
    with pytest.raises(DataError, match="draws at random"):
        prepare(section, tokenizer, tmp_path / "data", max_length=None)
    finding = check_rendering(read_split(find_source(section), section, "train", 2), tokenizer)
    assert finding.level == "error" and "draws at random" in finding.text
    with pytest.raises(ConfigError, match="draws at random"):
        RewardModelRanker(RankerSection(model=reward_model(tmp_path / "reward", tokenizer), dtype="float32"))


def reward_model(folder, tokenizer):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_judges_and_rankers_read_the_same_on_any_day(tmp_path, tokenizer, today):
    shown = Presentation(Comparison("why", "because", "so"), switched=False)
    plain = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    plain.chat_template = TEMPLATE.replace("strftime_now", "nothing")
    folders = {"reward_model": reward_model(tmp_path / "reward", tokenizer), "causal_lm": str(tmp_path / "lm")}
    AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy").save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    for kind, folder in folders.items():
        outcomes = []
        for day in (DAY, LATER):
            today(day)
            judge = load_judge(JudgeSection(kind=kind, model=folder, dtype="float32"), 1.0)
            outcomes += judge.answers([shown], [True])  # a failure holds the likeliest tokens
            # What was judged on unknown days before is not taken for this.
            assert judge.request(shown)["template_date"] == "2024-07-26"
        assert outcomes[0] == outcomes[1]
    scores = []
    for day in (DAY, LATER):
        today(day)
        ranker = RewardModelRanker(RankerSection(model=folders["reward_model"], dtype="float32"))
        scores += ranker.scores([Answered([{"role": "user", "content": "why"}], "so")], [True])
    assert scores[0] == scores[1] and ranker.made_by["template_date"] == "2024-07-26"
    undated = load_judge(JudgeSection(kind="reward_model", model=reward_model(tmp_path / "plain", plain)), 1.0)
    assert "template_date" not in undated.request(shown)


@pytest.mark.parametrize("start", ["", "\n", "  ", " {% if true %}x{% endif %}\n", "\n{%- if true %} y\n {% endif %}"])
def test_all_else_is_written_as_it_was(tokenizer, today, start):
    """Line breaks and spaces at the start included, and inside the template's own macros."""
    body = (
        "{% macro dated() %}{{ strftime_now('%A, %-d %B %Y; %j %H:%M%p %x') }}{% endmacro %}"
        "{% if strftime_now is defined %}{{ dated() }}{% endif %}{% for message in messages %}\n"
        "  {% if true %}\n[{{ message.content }}] {{ strftime_now('%Y-%m-%d') }}\n  {% endif %}{% endfor %}\n"
    )
    tokenizer.chat_template = start + body
    messages = [{"role": "user", "content": "50 %d"}, {"role": "user", "content": "strftime_now"}]
    today(calendar.date(2025, 12, 9))
    on_the_day = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "Tuesday, 9 December 2025; 343 23:59PM" in on_the_day
    today(DAY)
    assert render_chat(messages, tokenizer, "2025-12-09") == on_the_day.replace("23:59PM", "00:00AM")


def test_a_row_may_state_its_own_date(tokenizer, today):
    text = render_chat([{"role": "user", "content": "why"}], tokenizer, "2025-12-09")
    assert "Today Date: 09 Dec 2025" in text and "01 Mar" not in text


def test_the_bare_trainer_warns_of_dates(make_trainer, official_tokenizer, values, caplog, monkeypatch):
    """TRL renders what was not prepared, and it renders with the clock."""
    rows = [json.loads(line) for line in Path(values["data"]["source"]).read_text(encoding="utf-8").splitlines()]
    monkeypatch.setattr(official_tokenizer, "chat_template", TEMPLATE)
    with caplog.at_level(logging.WARNING, logger="epsdpo.methods.trainer"):
        make_trainer(Dataset.from_list(rows), max_length=256)
    assert "the chat template writes today's date" in caplog.text


def test_prepared_data_say_their_day(values, tmp_path, today):
    prepared_on(DAY, experiment_of(values), tmp_path / "data", today)
    assert load_prepared(tmp_path / "data").report["template_date"] == "2024-07-26"
