"""What rows bring beside prompt and responses: written into the texts, refused by name, or counted as not used."""

import json

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset
from kit import tiny_generation
from kit.official import OFFICIAL
from kit.tiny_stages import write_reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from epsdpo.__main__ import main
from epsdpo.data.on_policy.sample import sample_pairs
from epsdpo.data.prepared import DataError, columns_table, prepare
from epsdpo.data.prompts import read_prompts
from epsdpo.data.rendering import read_training_prompts, render_prompts
from epsdpo.experiment import ConfigError, DataSection, PromptsSection, ServerSection, check_experiment
from epsdpo.models.server import ServerEngine

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OTHER_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"left": {"type": "number", "minimum": 0}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lisbon"}}}
# In the manner of Qwen 3: tools before the turns, calls and reasoning in them, and a setting that ends the prompt.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% if documents %}documents: {{ documents | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}:"
    "{% if message.role == 'assistant' and loop.last and (message.reasoning_content or enable_thinking is false) %}"
    "<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}call {{ call.function | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
# Writes turns of user and assistant, and nothing else.
SPARSE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role in ('user', 'assistant') %}"
    "{{ message.role }}:{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def user(text, **fields):
    return {"role": "user", "content": text, **fields}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


ROW = {"prompt": [user("why")], "chosen": [assistant("because")], "rejected": [assistant("so")]}
WHOLE = {"chosen": [user("why"), assistant("because")], "rejected": [user("why"), assistant("so")]}
PLAIN = {"prompt": "why", "chosen": " because", "rejected": " so"}
TRANSCRIPT = {
    side: f"\n\nHuman: why\n\nAssistant: {text}" for side, text in (("chosen", "because"), ("rejected", "so"))
}


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prepared(tmp_path, tokenizer):
    def prepare_rows(rows, **section):
        source = write_jsonl(tmp_path / "rows.jsonl", rows)
        return prepare(DataSection(source=str(source), **section), tokenizer, tmp_path / "data", max_length=None)

    return prepare_rows


def split(data):
    return data.report["splits"]["train"]


def refused(data):
    return {reason: entry["examples"] for reason, entry in split(data)["refused"].items()}


# ------------------------------------------------------------------------------------------------------------ written


@pytest.mark.parametrize("row", [ROW, WHOLE, TRANSCRIPT], ids=["apart", "whole", "transcripts"])
def test_tools_and_settings_are_written(prepared, row):
    rows = [
        {**row, "tools": [TOOL]},
        {**row, "tools": json.dumps([OTHER_TOOL]), "chat_template_kwargs": {"enable_thinking": False}},
        {**row, "documents": [{"title": "t", "text": "d"}], "chat_template_kwargs": '{"enable_thinking": false}'},
        *({**row, "tools": nothing, "chat_template_kwargs": {}} for nothing in (None, [], "", "[]", "null")),
        row,
    ]
    data = prepared(rows)
    prompts = data.train["prompt"][:]
    turn = "user:why<eos>assistant:"
    assert prompts[0] == f"<bos>tools: {json.dumps([TOOL])}\n{turn}"
    assert prompts[1] == f"<bos>tools: {json.dumps([OTHER_TOOL])}\n{turn}<think></think>"
    assert prompts[2] == f'<bos>documents: [{{"title": "t", "text": "d"}}]\n{turn}<think></think>'
    assert set(data.train["chosen"][:]) == {"because<eos>"}
    assert set(prompts[3:]) == {f"<bos>{turn}"} and len(prompts) == 9
    assert split(data)["written_beside"] == {"tools": 2, "chat_template_kwargs": 2, "documents": 1}
    assert not any(split(data)["not_used"].values())


def test_ids_are_those_of_trl(tmp_path, tokenizer, prepared):
    rows = [
        {**ROW, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"enable_thinking": False}},
        {**ROW, "tools": json.dumps([OTHER_TOOL]), "chat_template_kwargs": {"enable_thinking": True}},
    ]
    trl = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(OFFICIAL / "ref"),
        args=DPOConfig(str(tmp_path / "trl"), max_length=None, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    ours = prepared(rows).train
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column][:] == trl.train_dataset[column][:]


@pytest.mark.parametrize("name", ["system", "system_prompt", "sys"])
@pytest.mark.parametrize("row", [ROW, WHOLE, TRANSCRIPT], ids=["apart", "whole", "transcripts"])
def test_a_system_text_becomes_the_system_turn(prepared, row, name):
    rows = [{**row, name: text} for text in ("be brief", "", None, "  ")]
    data = prepared(rows, **({"columns": {"system": "sys"}} if name == "sys" else {}))
    prompts = data.train["prompt"][:]
    assert prompts[0].startswith("<bos>system:be brief<eos>user:why")
    assert set(prompts[1:]) == {prompts[0].replace("system:be brief<eos>", "")}
    assert split(data)["written_beside"] == {"system" if name == "sys" else name: 1}


def test_a_system_text_beside_a_system_turn(prepared):
    prompt = [{"role": "system", "content": "be brief"}, user("why")]
    data = prepared(
        [
            {**ROW, "prompt": prompt, "system": "be brief "},
            {**ROW, "prompt": prompt, "system": "be long"},
            {**ROW, "system": "be brief", "system_prompt": "be long"},
        ]
    )
    assert refused(data) == {"two_systems": [1, 2]}
    assert data.train[0]["prompt"].count("be brief") == 1


def test_calls_and_reasoning_are_written(prepared):
    calls = [user("why"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}]
    rows = [
        {**ROW, "prompt": calls, "tools": [TOOL]},
        {**ROW, "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        {**ROW, "chosen": [assistant("because", reasoning_content="hm")]},
        {**ROW, "chosen": [assistant("because", thinking="hm")]},
        {**ROW, "prompt": [user("why"), assistant("x", reasoning_content="once"), user("and")]},
    ]
    data = prepared(rows)
    assert refused(data) == {}
    call = 'call {"name": "weather", "arguments": {"city": "Lisbon"}}'
    assert f"assistant:{call}<eos>tool:rain" in data.train[0]["prompt"]
    assert data.train[1]["chosen"] == f"{call}<eos>"
    assert data.train["chosen"][2:4] == ["<think>hm</think>because<eos>"] * 2
    # What a template does not repeat of earlier turns the model does not see either when it is asked.
    assert split(data)["not_used"] == {"messages.reasoning_content": 1}


def test_every_kind_of_file_gives_the_same(tmp_path, tokenizer):
    """Arrow fills every object up with the keys of the others, which a template would write as nulls."""
    rows = [
        {**ROW, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}, "score": 1.0},
        {**ROW, "tools": [OTHER_TOOL], "chat_template_kwargs": {"other": 1}, "score": None},
        {**ROW, "chosen": [assistant("x", tool_calls=[CALL])], "tools": [], "system": "be brief", "score": 2.0},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    assert table.column("tools")[0].as_py()[0]["function"]["parameters"]["properties"]["left"] is None
    pq.write_table(table, tmp_path / "b.parquet")
    feather.write_feather(table, tmp_path / "c.arrow")
    prepared = [
        prepare(DataSection(source=str(file)), tokenizer, tmp_path / f"out-{file.name}", max_length=None)
        for file in sorted(path for path in tmp_path.iterdir() if path.is_file())
    ]
    assert len(prepared) == 3 and "null" not in "".join(prepared[0].train["prompt"][:])
    for other in prepared[1:]:
        assert other.train.to_list() == prepared[0].train.to_list()
        assert split(other) == split(prepared[0])
    assert split(prepared[0])["not_used"] == {"score": 2, "chat_template_kwargs.other": 1}


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["image", "images", "video", "videos", "audio", "audios"])
def test_media_are_refused(prepared, name):
    data = prepared([ROW, {**ROW, name: ["a.png"]}, {**ROW, name: []}, {**ROW, name: "a.png"}])
    assert refused(data) == {"media": [1, 3]}


def test_a_question_in_two_columns_is_refused(prepared):
    """Alpaca's instruction with its input; a column that is the prompt itself is another matter."""
    row = {"instruction": "translate", "chosen": " a", "rejected": " b"}
    data = prepared(
        [row, {**row, "input": "bonjour"}, {**row, "history": [["a", "b"]]}], columns={"prompt": "instruction"}
    )
    assert refused(data) == {"question_apart": [1, 2]}
    data = prepared([{**PLAIN, "input": "bonjour"}])
    assert refused(data) == {} and split(data)["not_used"] == {"input": 1}
    data = prepared([{"input": "why", "chosen": " a", "rejected": " b"}], columns={"prompt": "input"})
    assert data.train[0]["prompt"] == "why" and split(data)["not_used"] == {}


def test_plain_text_has_no_place_for_tools_or_a_system_text(prepared):
    rows = [
        PLAIN,
        {**PLAIN, "tools": [TOOL]},
        {**PLAIN, "system": "be brief"},
        {**PLAIN, "documents": [{"text": "d"}]},
        {**PLAIN, "chat_template_kwargs": {"enable_thinking": False}},
    ]
    data = prepared(rows)
    assert refused(data) == {"needs_template": [1, 2, 3]}
    assert split(data)["not_used"] == {"chat_template_kwargs.enable_thinking": 1}


@pytest.mark.parametrize(
    "brought",
    [
        {"tools": "[{"},
        {"tools": "weather"},
        {"tools": {"name": "weather"}},
        {"tools": ["weather"]},
        {"documents": "a text"},
        {"chat_template_kwargs": "enable_thinking"},
        {"chat_template_kwargs": ["enable_thinking"]},
        {"chat_template_kwargs": {"chat_template": "{{ messages }}"}},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"system": ["be brief"]},
    ],
)
def test_settings_that_cannot_be_read_are_refused(prepared, brought):
    assert refused(prepared([ROW, {**ROW, **brought}])) == {"unreadable_settings": [1]}


@pytest.mark.parametrize(
    ("brought", "lost"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"documents": [{"text": "d"}]}, "documents"),
        ({"system": "be brief"}, "the turn of role system"),
        ({"prompt": [{"role": "system", "content": "be brief"}, user("why")]}, "the turn of role system"),
        ({"prompt": [user("why"), {"role": "tool", "content": "rain"}]}, "the turn of role tool"),
        ({"chosen": [assistant("because", tool_calls=[CALL])]}, "tool_calls"),
        ({"prompt": [user("a"), assistant("b", tool_calls=[CALL]), user("c")]}, "tool_calls"),
        ({"rejected": [assistant("because", reasoning_content="hm")]}, "reasoning_content"),
        ({"chosen": [assistant("because", thinking="hm")]}, "reasoning_content"),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_name(prepared, tokenizer, brought, lost):
    tokenizer.chat_template = SPARSE
    data = prepared([ROW, {**ROW, **brought}])
    assert refused(data) == {"template_leaves_out": [1]}
    assert split(data)["refused"]["template_leaves_out"]["message"].startswith(lost)


# ----------------------------------------------------------------------------------------------------------- counted


def test_everything_else_is_counted_as_not_used(prepared):
    rows = [
        {**ROW, "score_chosen": 1.0, "messages": [user("x")], "margin": 0.0, "weight": None, "source": ""},
        {**ROW, "score_chosen": None, "messages": [], "prompt": [user("why", name="Ann", timestamp=3)]},
        {**ROW, "score_chosen": 2.0, "chat_template_kwargs": {"unknown": 1}},
        {**ROW, "chosen": [], "score_chosen": 2.0, "prompt": [user("why", name="Ann")]},
    ]
    data = prepared(rows)
    assert split(data)["rows_kept"] == 3
    expected = {"score_chosen": 3, "messages": 1, "margin": 1, "weight": 0, "source": 0}
    fields = {"messages.name": 1, "messages.timestamp": 1, "chat_template_kwargs.unknown": 1}
    assert split(data)["not_used"] == expected | fields
    table = columns_table(data.report).set_index("column")
    assert table.loc["score_chosen"].to_dict() == {"split": "train", "rows with a value": 3, "use": "not used"}
    assert table.loc["chat_template_kwargs", "use"] == "written by the chat template"


def test_only_the_rows_that_are_taken_are_counted(prepared):
    data = prepared(
        [{**PLAIN, "score": 1.0, "images": None}, {**PLAIN, "score": 2.0, "images": ["x"]}], max_train_pairs=1
    )
    assert split(data)["not_used"] == {"score": 1} and refused(data) == {}


# ----------------------------------------------------------------------------------------------- prompts and evaluation


def read(tmp_path, rows, **section):
    return read_prompts(PromptsSection(source=str(write_jsonl(tmp_path / "prompts.jsonl", rows)), **section))


def test_prompts_bring_the_same(tmp_path, tokenizer, prepared):
    rows = [
        {"prompt": "why", "tools": json.dumps([TOOL]), "score": 1},
        {"instruction": "why", "system": "be brief", "generator": "gpt"},
        {"messages": [user("why")], "chat_template_kwargs": {"enable_thinking": False}},
        {"instruction": "translate", "input": "bonjour"},
        {"prompt": "why", "images": ["a.png"]},
        {"prompt": "why", "tools": "[{"},
        {"prompt": [{"role": "system", "content": "be long"}, user("why")], "system": "be brief"},
        {"prompt": "why", "tools": None, "input": ""},
    ]
    prompts = read(tmp_path, rows)
    left_out = {reason: entry["examples"] for reason, entry in prompts.report["left_out"].items()}
    assert left_out == {"question_apart": [3], "media": [4], "unreadable_settings": [5], "two_systems": [6]}
    assert prompts.report["not_used"] == {"score": 1, "generator": 1, "images": 1, "input": 1}
    texts = prompts.table["instruction"].tolist()
    assert texts[0] == f"Tools: {json.dumps([TOOL])}\n\nUser: why" and texts[1] == "System: be brief\n\nUser: why"
    assert texts[2:] == ["why", "why"]
    training = [
        {**ROW, "tools": [OTHER_TOOL]},
        {**ROW, "system": "be brief"},
        {**ROW, "chat_template_kwargs": {"enable_thinking": False}},
        ROW,
    ]
    prepared(training)
    training = read_training_prompts(tmp_path / "data")
    rendered = render_prompts(list(prompts.table["messages"]), tokenizer, training, prompts.variables)
    assert [prompt.text for prompt in rendered] == [
        f"<bos>tools: {json.dumps([TOOL])}\nuser:why<eos>assistant:",
        "<bos>system:be brief<eos>user:why<eos>assistant:",
        "<bos>user:why<eos>assistant:<think></think>",
        "<bos>user:why<eos>assistant:",
    ]


def test_a_named_column_of_prompts_brings_its_neighbours(tmp_path):
    rows = [{"question": "why", "system": "be brief", "messages": [user("x")]}, {"question": "why", "video": "a.mp4"}]
    prompts = read(tmp_path, rows, column="question")
    assert prompts.table["messages"].tolist() == [[{"role": "system", "content": "be brief"}, user("why")]]
    assert prompts.report["left_out"]["media"]["rows"] == 1
    assert prompts.report["not_used"] == {"messages": 1, "video": 1}


def test_prompts_that_bring_nothing_are_as_before(tmp_path):
    prompts = read(tmp_path, [{"prompt": "why"}, {"prompt": "how", "tools": []}])
    assert prompts.variables is None and "template_variables" not in prompts.table


def test_a_template_that_leaves_a_part_of_a_prompt_out_is_refused(tmp_path, tokenizer, prepared):
    tokenizer.chat_template = SPARSE
    prepared([ROW])
    training = read_training_prompts(tmp_path / "data")
    for messages, variables, lost in (
        ([user("why")], {"tools": [TOOL]}, "tools"),
        ([{"role": "system", "content": "be brief"}, user("why")], {}, "the turn of role system"),
    ):
        with pytest.raises(DataError, match=f"leaves out of a prompt: {lost}"):
            render_prompts([messages], tokenizer, training, [variables])


def test_a_model_of_plain_text_is_asked_no_tools(tmp_path, tokenizer, prepared):
    prepared([PLAIN])
    with pytest.raises(DataError, match="a prompt brings tools, but the model was trained on plain text"):
        render_prompts([[user("why")]], tokenizer, read_training_prompts(tmp_path / "data"), [{"tools": [TOOL]}])


def test_a_chat_server_is_not_left_to_render_tools(tokenizer):
    server = ServerSection(base_url="http://localhost:1/v1", policy="a", reference="b", endpoint="chat")
    engine = ServerEngine(server, "a", tokenizer, tiny_generation.SETTINGS, 0, {})
    prompt = tiny_generation.RenderedPrompt([user("why")], "why", [5], 0, {"tools": [TOOL]})
    with pytest.raises(ConfigError, match="prompts bring tools for the chat template"):
        list(engine.answers([prompt], [True]))


def test_sampled_pairs_keep_the_settings_that_they_were_asked_with(tmp_path, tokenizer):
    AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "tell me about the soup:", "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": "tell me about the clock:", "tools": [TOOL]},
        {"prompt": "tell me about the robot:", "system": "be brief"},
    ]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    values = {
        "name": "sampled",
        "method": "dpo",
        "train": {},
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {
            "source": "on_policy",
            "on_policy": {
                "prompts": {"source": str(prompts)},
                "ranker": {"model": str(write_reward_model(tmp_path / "reward")), "dtype": "float32"},
                "responses_per_prompt": 3,
                "max_new_tokens": 6,
            },
        },
    }
    experiment = check_experiment(values, where="test")
    sampled = sample_pairs(experiment, tmp_path / "sample")
    assert sampled.report["prompts"]["with_tools_or_documents"] == 1 and sampled.report["prompts"]["asked"] == 2
    source = DataSection(source=str(tmp_path / "sample" / "pairs.parquet"))
    data = prepare(source, tokenizer, tmp_path / "data", max_length=None)
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "sample" / "generated.jsonl").read_text().splitlines()]
    assert {prompt.endswith("assistant:<think></think>") for prompt in asked if "soup" in prompt} == {True}
    assert {prompt.startswith("<bos>system:be brief<eos>") for prompt in asked if "robot" in prompt} == {True}
    assert all(row["prompt"] in asked for row in data.train)
    assert split(data)["written_beside"] == {"chat_template_kwargs": 1}
    assert set(data.report["splits"]["train"]["not_used"]) == {"chosen_score", "rejected_score"}


# --------------------------------------------------------------------------------------------------- check and trainer


def test_check_names_what_is_not_used_and_what_is_refused(tmp_path, tokenizer, capsys):
    tokenizer.chat_template = SPARSE
    AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tmp_path / "run.yaml"
    values = {
        "method": "dpo",
        "train": {"beta": 0.1},
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "model": {"name_or_path": str(tmp_path / "model")},
    }
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", [{**ROW, "score": 1.0, "nothing": None}])
    assert main(["check", str(config)]) == 0
    assert "data: columns that are not used: score\n" in capsys.readouterr().out
    write_jsonl(tmp_path / "rows.jsonl", [{**ROW, "tools": [TOOL]}])
    assert main(["check", str(config)]) == 2
    assert "does not write something that it brings (tools in none of what it writes)" in capsys.readouterr().out


def test_check_warns_of_prompts_that_would_be_refused_after_training(tmp_path, tokenizer, capsys):
    AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tmp_path / "run.yaml"
    rows, prompts = tmp_path / "rows.jsonl", tmp_path / "prompts.jsonl"
    values = {
        "method": "dpo",
        "train": {"beta": 0.1},
        "data": {"source": str(rows)},
        "model": {"name_or_path": str(tmp_path / "model")},
        "evaluate": {"prompts": {"source": str(prompts)}, "judge": None},
    }
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    for brought in ({}, {"system": "be brief"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        write_jsonl(rows, [{**ROW, **brought}])
        for asked in ({}, brought):
            write_jsonl(prompts, [{"prompt": "how", **asked}])
            assert main(["check", str(config)]) == 0
            warned = "evaluate.prompts, by the first rows of the data" in capsys.readouterr().out
            assert warned == (asked != brought), (brought, asked)


@pytest.mark.parametrize("name", ["system", "system_prompt", "documents", "videos", "audio"])
def test_the_bare_trainer_refuses_what_trl_leaves_out(make_trainer, name):
    row = {"prompt": "tell me about the soup:", "chosen": " the chef cooks", "rejected": " a robot"}
    make_trainer(Dataset.from_list([{**row, name: ""}] * 4))
    with pytest.raises(ValueError, match=f"a column '{name}', which TRL does not write into the prompt"):
        make_trainer(Dataset.from_list([{**row, name: ""}, {**row, name: "be brief"}]))
