"""Which weights and tokenizer an experiment starts from.

The embedded world's model, a local folder or GGUF file, or a pinned hub model. Training and evaluation both ask here,
so that the reference of one is the reference of the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from epsdpo.experiment import WORLD, ConfigError, Experiment, ModelSection
from epsdpo.experiment.gguf_file import GgufError, is_gguf, with_content
from epsdpo.experiment.paths import looks_local, resolve_path
from epsdpo.files import read_text
from epsdpo.methods.loading import OwnCodeError, read_config, read_tokenizer
from epsdpo.methods.vocabulary import require_known_tokens
from epsdpo.models.gguf import as_folder
from epsdpo.models.hub import commit_of
from epsdpo.models.local_models import NOT_HERE
from epsdpo.runs.layout import MODEL_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Start(NamedTuple):
    """Where a model is loaded from: a folder or hub id, and its revision."""

    source: str
    revision: str | None


def start_of(experiment: Experiment) -> Start:
    """Where the reference (and the policy before training) is loaded from."""
    model = experiment.model
    if model.name_or_path == WORLD:
        from epsdpo.world.build import reference_model_dir

        return Start(str(reference_model_dir(experiment.data.world)), None)
    try:
        return Start(*as_folder(model.name_or_path, model.revision))
    except GgufError as error:
        raise ConfigError(f"model.name_or_path: {error}") from error


def load_tokenizer(experiment: Experiment) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that an experiment starts from, with the chat template that the experiment gives it.

    Raises:
        ConfigError: if it or the template cannot be loaded, naming them and what to try.
    """
    source, revision = start_of(experiment)
    _require_folder(source)
    try:
        tokenizer = read_tokenizer(source, revision)
    except OwnCodeError as error:
        raise ConfigError(f"model.name_or_path: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name_or_path: cannot load the tokenizer of {source!r}"
            f"{f' at revision {revision}' if revision else ''}: {error}\n"
            "Check the name, log in to the hub if the model is gated, or give the path of a local copy"
        ) from error
    if experiment.model.chat_template is not None:
        tokenizer.chat_template = read_chat_template(experiment.model.chat_template)
    return tokenizer


def require_data_fit(experiment: Experiment, data: Any) -> None:
    """Refuse prepared data with tokens that the starting model has no embedding for, as after a change of tokenizer.

    Args:
        data: its splits are `train` and `eval`, which may be None.

    Raises:
        ConfigError: naming the token and the remedy.
    """
    source, revision = start_of(experiment)
    embeddings = read_config(source, revision).get_text_config().vocab_size
    tables = [table for table in (data.train, data.eval) if table is not None]
    require_known_tokens(tables, load_tokenizer(experiment), embeddings, source)


def read_chat_template(place: str, local_files_only: bool = False) -> str:
    """The text of a template file, or the template of another model.

    Raises:
        ConfigError: if there is none, naming the place and what to try.
    """
    try:
        if place.endswith(".jinja"):
            return read_text(resolve_path(place))
        source, _, revision = place.partition("@")
        source, commit = as_folder(source, revision or None)
        template = read_tokenizer(source, commit, local_files_only=local_files_only).chat_template
    except (GgufError, OwnCodeError) as error:
        raise ConfigError(f"model.chat_template: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.chat_template: cannot read one from {place!r}: {error}\n"
            "Give the path of a .jinja file, or a folder or hub id of a model that has one (gated ones need a login)"
        ) from error
    if not isinstance(template, str):
        raise ConfigError(f"model.chat_template: the tokenizer of {place!r} has none. Name an instruction-tuned model")
    return template


def _require_folder(source: str) -> None:
    """Refuse a path at which there is nothing, before the hub is asked for a model of that name."""
    if looks_local(source) and not Path(source).exists():
        raise ConfigError(f"model.name_or_path is {source!r}: {NOT_HERE.format(Path.cwd())}")


def after_sft(experiment: Experiment, sft_dir: str | Path) -> Experiment:
    """The experiment as it goes on after its SFT: from the model in `sft_dir`, or as it was where it has no SFT.

    Args:
        sft_dir: what fine-tuning wrote, "" for an experiment without `model.sft`. The tokenizer there has the
            experiment's chat template.

    Raises:
        ConfigError: if `sft_dir` is missing, unfinished, or given to an experiment without SFT.
    """
    if experiment.model.sft is None:
        if sft_dir:
            raise ConfigError(f"sft_dir is {str(sft_dir)!r}, but the config has no section model.sft. Leave it out")
        return experiment
    if not sft_dir:
        raise ConfigError(
            f"experiment {experiment.name!r} starts from an SFT model (model.sft), and none is named. Run the stage "
            "`sft` first and give its folder as sft_dir; `python -m epsdpo run` does both"
        )
    folder = Path(sft_dir) / MODEL_FOLDER
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no SFT model; run the stage `sft` of this experiment (to its end) first")
    start = {"name_or_path": str(folder), "revision": None, "chat_template": None, "sft": None}
    return experiment.model_copy(update={"model": experiment.model.model_copy(update=start)})


def pin_revision(model: ModelSection) -> ModelSection:
    """The same section with the commit that a hub model's branch, tag or missing revision stands for today, or with
    the content of a GGUF file.

    Raises:
        ConfigError: if the hub cannot be asked, or the file is not there, or not that of the revision.
    """
    if is_gguf(model.name_or_path):
        try:
            return with_content(model)
        except GgufError as error:
            raise ConfigError(f"model.name_or_path: {error}") from error
    if model.name_or_path == WORLD or Path(model.name_or_path).exists():
        return model
    _require_folder(model.name_or_path)
    try:
        commit = commit_of(model.name_or_path, model.revision, "model")
    except Exception as error:  # see `commit_of`
        raise ConfigError(
            f"model.name_or_path: {model.name_or_path!r} is no local folder, and the hub cannot be asked which commit "
            f"it stands at ({type(error).__name__}: {str(error).partition(chr(10))[0]}). Give model.revision as a full "
            "commit, or the path of a local copy"
        ) from error
    return model.model_copy(update={"revision": commit})
