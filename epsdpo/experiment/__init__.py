"""Experiment configs: what a YAML file may say, how it becomes experiments, and whose results a folder holds.

The public names are these. Nothing here touches data or models, and torch and trl are loaded only where the `train`
section, whose keys are theirs, is checked.
"""

from epsdpo.experiment.load import load_experiment, load_experiments, load_variant
from epsdpo.experiment.saved import EXPERIMENT_FILE, claim_folder, experiment_text, load_saved, save_experiment
from epsdpo.experiment.schema import Experiment
from epsdpo.experiment.sections.base import TEMPLATE_DATE, WORLD
from epsdpo.experiment.sections.data import ON_POLICY, DataSection, WorldSection
from epsdpo.experiment.sections.evaluate import CalibrateSection, EvaluateSection
from epsdpo.experiment.sections.model import LoraSection, ModelSection, SftSection
from epsdpo.experiment.sections.on_policy import OnPolicySection, PromptsSection, RankerSection
from epsdpo.experiment.sections.server import ServerSection
from epsdpo.experiment.validate import check_experiment
from epsdpo.methods.errors import ConfigError

__all__ = [
    "EXPERIMENT_FILE",
    "ON_POLICY",
    "TEMPLATE_DATE",
    "WORLD",
    "CalibrateSection",
    "ConfigError",
    "DataSection",
    "EvaluateSection",
    "Experiment",
    "LoraSection",
    "ModelSection",
    "OnPolicySection",
    "PromptsSection",
    "RankerSection",
    "ServerSection",
    "SftSection",
    "WorldSection",
    "check_experiment",
    "claim_folder",
    "experiment_text",
    "load_experiment",
    "load_experiments",
    "load_saved",
    "load_variant",
    "save_experiment",
]
