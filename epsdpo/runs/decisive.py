"""What of an experiment decides the result of each stage; the rest of its config can change without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epsdpo.experiment import Experiment
from epsdpo.experiment.gguf_file import told_by_content
from epsdpo.experiment.schema import ABOUT_EARLIER_PARTS
from epsdpo.experiment.sections.server import ACCESS
from epsdpo.runs.reach import digest

# They decide how soon and at what price an answer comes, and not what it says.
_NEVER_DECISIVE = {
    "evaluate": ("batch_size",),
    "server": (*ACCESS, "reference_url"),
    "judge": (*ACCESS, "input_price", "output_price", "batch_size"),
}


def of_sampling(experiment: Experiment) -> dict[str, Any]:
    data = _data(experiment)
    world = {"world": data["world"]} if experiment.data.speaks_world else {}
    return {
        "on_policy": data["on_policy"],
        "model": _loaded_model(experiment),
        "max_prompt_length": data["max_prompt_length"],
        "template_date": data["template_date"],
        **world,
    }


def of_prepared_data(experiment: Experiment) -> dict[str, Any]:
    # Pairs that were sampled are those of the model as it was loaded.
    model = _tokenizer(experiment) if experiment.data.on_policy is None else _loaded_model(experiment)
    return {"data": _data(experiment), "model": model, "max_length": experiment.train["max_length"]}


def of_sft(experiment: Experiment) -> dict[str, Any]:
    return {
        **of_prepared_data(experiment),
        "model": _loaded_model(experiment),
        "sft": experiment.model_dump()["model"]["sft"],
        "use_cpu": experiment.train.get("use_cpu", False),
    }


def _data(experiment: Experiment) -> dict[str, Any]:
    data = experiment.data.model_dump()
    if data["on_policy"] is not None:
        data["on_policy"]["ranker"] = told_by_content(data["on_policy"]["ranker"], "model")
    if data["on_policy"] is not None and data["on_policy"]["server"] is not None:
        data["on_policy"]["server"] = _decisive("server", data["on_policy"]["server"])
    return data


def _decisive(name: str, section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in _NEVER_DECISIVE[name]}


def of_training(experiment: Experiment) -> dict[str, Any]:
    values = experiment.model_dump(exclude={"train": set(ABOUT_EARLIER_PARTS)})
    values["model"] = told_by_content(values["model"], "name_or_path")
    return {section: values[section] for section in ("method", "seed", "model", "train")}


def of_evaluation(experiment: Experiment) -> dict[str, Any]:
    """The `evaluate` section without what changes no answer, and with the judge's template as what it says."""
    values = experiment.model_dump()
    settings = {section: values[section] for section in ("title", "seed", "evaluate")}
    evaluate = settings["evaluate"]
    if evaluate is None:
        return settings
    sections = {"evaluate": evaluate, **{name: evaluate[name] for name in ("server", "judge")}}
    kept = {name: _decisive(name, section) for name, section in sections.items() if section is not None}
    if evaluate["judge"] is not None and evaluate["judge"]["kind"] != "chat":  # whose model is only a server's name
        kept["judge"] = told_by_content(kept["judge"], "model")
    template = Path((evaluate["judge"] or {}).get("template") or "")
    if template.is_file():  # one that is not there is refused when the judge is loaded
        kept["judge"]["template"] = digest(template.read_bytes())
    return settings | {"evaluate": kept.pop("evaluate") | kept}


def _tokenizer(experiment: Experiment) -> dict[str, Any]:
    model = experiment.model.model_dump(include={"name_or_path", "revision", "chat_template"})
    return told_by_content(model, "name_or_path")


def _loaded_model(experiment: Experiment) -> dict[str, Any]:
    return {**_tokenizer(experiment), **experiment.model.model_dump(include={"dtype", "attn_implementation"})}
