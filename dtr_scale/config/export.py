"""The experiment file's JSON Schema, for editors: configs/experiment.schema.json."""

import json

from dtr_scale.config.schema import Experiment


def experiment_schema() -> str:
    """Return the JSON Schema as text; a test keeps the committed file equal to it."""
    return json.dumps(Experiment.model_json_schema(by_alias=True), indent=2) + "\n"
