"""`python -m epsdpo check`: every config of the repository passes, and what would go wrong is found before it does."""

from pathlib import Path

import pytest
import yaml
from kit.tiny_architectures import save_data, save_miniature
from transformers import AutoConfig, AutoTokenizer

from epsdpo.__main__ import main
from epsdpo.batch.check.arithmetic import check_arithmetic
from epsdpo.batch.check.configs import ERROR, NOTE, OK, WARNING, check_configs, config_files
from epsdpo.batch.check.pins import check_sources
from epsdpo.batch.check.texts import check_rendering, sample_rows
from epsdpo.experiment import DataSection, check_experiment, load_experiments
from epsdpo.experiment.load import layered_experiments
from epsdpo.train.memory import ModelShape, Setting, Sharding, estimate_memory

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA, GEMMA, QWEN = "meta-llama/Meta-Llama-3-8B-Instruct", "google/gemma-2-2b", "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    models = {name: save_miniature(name, folder / name.replace("/", "--")) for name in (LLAMA, GEMMA, QWEN)}
    return models | save_data(folder)


@pytest.fixture
def local(tmp_path, stand_ins):
    """Write a config of a run on local files, with changes, and return the findings on it."""

    def findings(processes=1, model=LLAMA, **changes):
        values = {
            "method": "epsilon_dpo",
            "data": {"source": str(stand_ins["princeton-nlp/llama3-ultrafeedback"]), "eval_split": "test"},
            "model": {"name_or_path": str(stand_ins[model])},
            "train": {"learning_rate": 7.0e-7, "global_batch_size": 8, "per_device_train_batch_size": 2},
        }
        for section, more in changes.items():
            values[section] = {**values[section], **more} if isinstance(more, dict) else more
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        [checked] = check_configs([path], processes=processes)
        return checked.findings

    return findings


def of(findings, beginning):
    [finding] = [finding for finding in findings if finding.text.startswith(beginning)]
    return finding


FILES = config_files([CONFIGS / folder for folder in ("demo", "paper", "small")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_config_of_the_repository_passes(file):
    # As many GPUs as the paper had for UltraFeedback; on Anthropic-HH it had four, which divide a batch that these do.
    for checked in check_configs([file], processes=16 if "paper" in file.parts else 1):
        assert not checked.fails, checked.text()
        assert [finding.level for finding in checked.findings][:2] == [OK, OK]  # arguments and batch
        criterion = [finding for finding in checked.findings if finding.text.startswith("criterion")]
        assert all(finding.level == OK for finding in criterion), checked.text()


def criterion_of(file, overrides=None):
    """Names of the experiments of a file, each with its finding on the criterion."""
    return {
        experiment.name: finding
        for experiment, layers in layered_experiments(file, overrides)
        for finding in check_arithmetic(experiment, layers)
    }


@pytest.mark.parametrize(
    "file",
    config_files([CONFIGS / name for name in ("paper_mini", "real_mini", "real_mini/overnight", "stages")]),
    ids=lambda file: file.stem,
)
def test_what_departs_on_purpose_and_is_no_recipe_of_the_paper_is_not_warned_of(file):
    assert {finding.level for finding in criterion_of(file).values()} <= {OK}


PUBLISHED = "train.criterion_dtype: bfloat16 restores the published algorithm"


@pytest.mark.parametrize(
    ("extended", "text", "overrides", "said"),
    [
        ("paper/table1_mistral/epsilon_dpo.yaml", "", None, None),
        ("paper/table1_mistral/dpo.yaml", "train: {criterion_dtype: float32}", None, None),  # keeps β
        ("paper/table1_llama3/epsilon_dpo.yaml", "", {"train.epsilon_step": 0.0}, None),  # and so does this
        ("paper_mini/epsilon_dpo_fp32.yaml", "", None, None),
        ("paper/_llama3_instruct.yaml", "method: epsilon_dpo", None, "exact (train.criterion_dtype is 'float32', its"),
        ("small/table1/epsilon_dpo.yaml", "train: {criterion_dtype: float16}", None, "'float16', by {file})"),
        ("small/_anthropic_hh.yaml", "method: epsilon_dpo", {"train.criterion_dtype": "bfloat16_logits"}, "by --set)"),
        (
            "small/table3_qwen2.5/epsilon_dpo.yaml",
            "sweep: {train.criterion_dtype: [bfloat16, bfloat16_logits]}",
            None,
            "bfloat16 logits (train.criterion_dtype is 'bfloat16_logits', by {file}: sweep)",
        ),
    ],
)
def test_a_recipe_of_the_paper_with_another_criterion_is_warned_of(tmp_path, extended, text, overrides, said):
    """Wherever the value is from; and no error, since it is a choice."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {CONFIGS / extended}\n{text}\n", encoding="utf-8")
    warnings = [finding for finding in criterion_of(file, overrides).values() if finding.level != OK]
    assert [finding.level for finding in warnings] == ([WARNING] if said else [])
    for finding in warnings:
        assert said.format(file=file) in finding.text and finding.text.endswith(PUBLISHED)


@pytest.mark.parametrize(
    ("train", "dtype", "released"),
    [
        ({}, "bfloat16", "all bfloat16 under DeepSpeed ZeRO, bfloat16 logits elsewhere"),
        ({"bf16": True}, "float32", "all bfloat16 under DeepSpeed ZeRO, bfloat16 logits elsewhere"),
        ({"fp16": True}, "float32", "all float16 under DeepSpeed ZeRO, float16 logits elsewhere"),
        ({"bf16": False}, "float32", "exact"),
        ({"bf16": False}, "bfloat16", "all bfloat16"),
    ],
)
def test_what_the_released_code_would_compute_follows_from_precision_and_launch(tmp_path, train, dtype, released):
    file = tmp_path / "mine.yaml"
    values = {"method": "epsilon_dpo", "train": {**train, "criterion_dtype": "float32"}, "model": {"dtype": dtype}}
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    [finding] = criterion_of(file).values()
    assert finding.text == f"criterion: exact; the released code with these settings: {released}"


def test_folders_are_searched_at_any_depth_and_bases_left_out():
    assert len(FILES) > 60 and not any(file.name.startswith("_") for file in FILES)
    assert {file.relative_to(CONFIGS).parts[0] for file in FILES} == {"demo", "paper", "small"}


def test_the_grid_of_table_6_is_one_entry_of_twelve_experiments():
    [checked] = check_configs([CONFIGS / "paper" / "table6_llama3"], processes=16)
    assert len(checked.names) == 12 and "(12 experiments)" in checked.text().splitlines()[0]
    train = [experiment.train for experiment in load_experiments(CONFIGS / "paper" / "table6_llama3")]
    points = {(one["learning_rate"], one["epsilon"]) for one in train}
    assert points == {(rate, size) for rate in (3e-7, 5e-7, 7e-7, 1e-6) for size in (0.005, 0.01, 0.02)}


def test_batch_is_split_over_the_processes_that_are_meant(local):
    assert of(local(), "batch").text == "batch: 8 pairs = 1 process × 2 pairs × 4 passes"
    assert of(local(processes=2), "batch").text == "batch: 8 pairs = 2 processes × 2 pairs × 2 passes"
    wrong = of(local(processes=3), "train.global")
    assert wrong.level == ERROR and "Start a number of processes that divides it: 1 or 2 or 4 or 8" in wrong.text


def test_memory_is_that_of_the_estimate(local, stand_ins):
    shape = ModelShape.of(AutoConfig.from_pretrained(stand_ins[LLAMA]))
    setting = Setting(
        model=shape,
        weight_bytes=4,
        mixed_precision=True,
        optim="adamw_torch",
        pairs=2,
        accumulation=2,
        tokens=4096,
        completion_tokens=4096,
        checkpointing=False,
        attention="sdpa",
        sharding=Sharding("FSDP", 2),
    )
    train = {"max_length": 4096, "optim": "adamw_torch", "activation_checkpointing": False, "bf16": True}
    finding = of(local(processes=2, train=train), "memory")
    assert f"{estimate_memory(setting).peak / 2**30:.1f} GiB shares (FSDP2)" in finding.text


def test_rows_and_template_are_shown_as_the_model_reads_them(local):
    """Llama 3 with its one BOS, and a turn that ends in its end-of-turn token."""
    finding = of(local(), "texts")
    assert finding.level == OK and finding.text.endswith("one BOS in front")
    assert "'<|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nHow many legs" in finding.text
    assert finding.text.split("ends in ")[1].startswith("'.<|eot_id|>'")
    assert of(local(model=QWEN), "texts").text.endswith("the tokenizer has no BOS")


def test_a_template_that_writes_no_bos_or_two_is_found(stand_ins):
    rows = sample_rows(DataSection(source="princeton-nlp/llama3-ultrafeedback"))
    tokenizer = AutoTokenizer.from_pretrained(stand_ins[LLAMA])
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("{{ bos_token }}", "")
    assert check_rendering(rows, tokenizer).level == WARNING
    tokenizer.chat_template = "{{ bos_token }}" + template
    twice = check_rendering(rows, tokenizer)
    assert twice.level == ERROR and "the tokens start with two BOS" in twice.text
    tokenizer.chat_template = None
    assert "has no chat template" in check_rendering(rows, tokenizer).text


def test_transcripts_of_the_hub_are_rendered_without_their_headers(stand_ins):
    rows = sample_rows(DataSection(source="Anthropic/hh-rlhf", subset=["helpful-base", "harmless-base"]))
    finding = check_rendering(rows, AutoTokenizer.from_pretrained(stand_ins[GEMMA]))
    assert finding.level == OK and "Human:" not in finding.text
    assert "'<bos><start_of_turn>user\\nHow many legs has a spider?<end_of_turn>" in finding.text


def test_local_data_that_cannot_be_prepared_are_an_error(local):
    missing = local(data={"eval_split": "validation"})
    assert [finding.level for finding in missing if "no split 'validation'" in finding.text] == [ERROR]


def test_what_is_not_here_is_said_and_no_error():
    [checked] = check_configs([CONFIGS / "paper" / "table1_llama3" / "epsilon_dpo.yaml"], processes=16)
    assert of(checked.findings, "memory: not estimated").level == NOTE
    assert of(checked.findings, "tokenizer: not tried").level == NOTE


def test_unpinned_revisions_and_gated_models_are_named():
    experiment = check_experiment(
        {
            "name": "run",
            "method": "dpo",
            "train": {},
            "data": {"source": "owner/pairs", "revision": "main"},
            "model": {"name_or_path": GEMMA, "revision": "c" * 40},
        },
        "run.yaml",
    )
    findings = list(check_sources(experiment))
    assert [finding.level for finding in findings] == [OK, NOTE, WARNING]
    assert findings[1].text.startswith(f"model: {GEMMA} is gated")
    assert (
        "data: owner/pairs is not pinned to a commit (revision 'main')" in findings[2].text
        and "dataset_info('owner/pairs').sha" in findings[2].text
    )


def test_weights_in_half_precision_without_sharding_are_warned_of(stand_ins, tmp_path):
    path = tmp_path / "run.yaml"
    values = {"method": "dpo", "train": {"learning_rate": 7.0e-7}, "data": {"source": str(tmp_path / "pairs.jsonl")}}
    for dtype, lora, processes, level in [
        ("bfloat16", None, 1, WARNING),
        ("bfloat16", None, 4, NOTE),
        ("bfloat16", {}, 1, None),
        ("float32", None, 1, None),
    ]:
        model = {"name_or_path": str(stand_ins[LLAMA]), "dtype": dtype, "lora": lora}
        path.write_text(yaml.safe_dump({**values, "model": model}), encoding="utf-8")
        [checked] = check_configs([path], processes=processes)
        found = [finding.level for finding in checked.findings if finding.text.startswith("model.dtype")]
        assert found == ([level] if level else []), (dtype, lora, processes)


def test_exit_code_and_output(tmp_path, capsys):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("method: dpo\ntrain: {beta: 0.1}\n", encoding="utf-8")
    bad.write_text("method: dpo\ntrain: {beta: -0.1}\n", encoding="utf-8")
    assert main(["check", str(good)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{good}: good"
    assert main(["check", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert f"error   {bad}: train.beta=-0.1 must be positive" in printed and f"{good}: good" in printed
    assert main(["check", str(tmp_path / "nowhere")]) == 2


def test_of_a_folder_each_line_is_said_once_with_what_differs(capsys):
    assert main(["check", str(CONFIGS / "paper" / "table1_llama3"), "--num-processes", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("  ")]
    assert len(set(found)) == len(found)
    assert "cpo, dpo, epsilon_dpo, ipo, kto, orpo, simpo, slic_hinge (8 experiments)" in lines[0]
    assert sum("is gated" in line for line in found) == 1
    takes = [line for line in found if "takes all" in line]
    assert any("CPOConfig" in line for line in takes) and any("EpsilonDPOConfig" in line for line in takes)
    after = lines.index(next(line for line in lines if "KTO" in line))
    assert lines[after - 1].endswith("table1_llama3/kto.yaml: kto")
