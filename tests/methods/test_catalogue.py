"""The table of methods: what it names is there, and names are known without torch."""

import dataclasses
import subprocess
import sys

import pytest
from transformers import Trainer

from epsdpo.experiment.schema import STATED_ELSEWHERE
from epsdpo.methods.catalogue import CATALOGUE, METHODS, NO_METHODS, config_class, trainer_class
from epsdpo.methods.method_config import MethodConfig


@pytest.mark.parametrize("method", METHODS)
def test_an_entry_names_its_config_its_trainer_and_keys_that_exist(method):
    config, trainer = config_class(method), trainer_class(method)
    assert issubclass(config, MethodConfig) and issubclass(trainer, Trainer)
    fields = {field.name for field in dataclasses.fields(config)}
    assert {*CATALOGUE[method].reads, *CATALOGUE[method].decides} <= fields
    assert not {*CATALOGUE[method].reads} & {*STATED_ELSEWHERE}
    assert method not in NO_METHODS


def test_names_are_known_without_torch_and_configs_without_trainers():
    program = (
        "import sys\nfrom epsdpo.methods.catalogue import METHODS, config_class\n"
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)\n"
        "for method in METHODS: config_class(method)\n"
        "ours = [name for name in sys.modules if name.startswith('epsdpo.methods.')]\n"
        "sys.exit({'epsdpo.methods.trainer', 'epsdpo.methods.recorded', 'epsdpo.methods.kernels'} & {*ours} or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
