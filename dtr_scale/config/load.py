"""Read an experiment: a JSON file, then dotted overrides, then validation."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dtr_scale.config.messages import explain, known_keys, suggestion
from dtr_scale.config.schema import Experiment, ModelConfig
from dtr_scale.errors import ConfigError
from dtr_scale.logs import without_password

SECRETS = frozenset({"key", "secret", "token"})
"""Names in data.storage_options that are used and never written anywhere."""

PATHS = (
    "run_dir",
    "data.shards",
    "data.cache_dir",
    "checkpoint.dir",
    "checkpoint.start_from",
    "tracking.uri",
    "evaluation.reference",
    "evaluation.inception_weights",
    "evaluation.dinov2_weights",
)
"""Keys whose value may be a path on this machine."""

_SQLITE_FILE = re.compile(r"sqlite[+\w]*:///(?!:memory:|$)")
# An empty tracking.uri means none, not the current folder.
_NO_PATH = re.compile(r"$|file:|[\w+.-]+://|(databricks(-uc)?|uc)$")  # the last are MLflow's names
_MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
_TWICE = object()


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment in `path` with `overrides` applied.

    Overrides are `--section.key=value` or `--section.key value`; a value is read as JSON, and as
    a string where it is not JSON. Raises ConfigError, with a line for each mistake.
    """
    raw = _read_json(Path(path), "the experiment file", example="configs/demo_digits.json")
    given = list(parse_overrides(overrides))
    for key, value in given:
        _set(raw, key, value)
    # After the overrides, one of which may name the file.
    engine = raw.get("engine")
    if isinstance(engine, dict) and isinstance(engine.get("deepspeed_config"), str):
        # Here, so that the config which a run keeps is complete.
        place = "engine.deepspeed_config"
        engine["deepspeed_config"] = _read_json(
            Path(engine["deepspeed_config"]), place, example="deepspeed.json"
        )
    return validate(raw, source=str(path), overrides=[key for key, _ in given])


def validate(raw: dict[str, Any], source: str, overrides: Collection[str] = ()) -> Experiment:
    """Return `raw` as an Experiment; ConfigError names all that is wrong, a line each.

    `overrides` are the keys that do not come from `source` but from the command line.
    """
    try:
        # Strict JSON mode: "8" is no integer and true is no step count.
        experiment = Experiment.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error.errors(include_url=False), source, overrides)) from None
    # No validator of the schema: the list of known keys is made from it (messages.py).
    allowed = "checkpoint.allow_changes"
    where = "the command line" if allowed in overrides else source
    if unknown := [k for k in experiment.checkpoint.allow_changes if k not in known_keys()]:
        told = (f"{where}: {allowed} names an unknown key {k}{suggestion(k)}" for k in unknown)
        raise ConfigError("\n".join(told))
    return experiment


def validate_model(raw: dict[str, Any], source: str) -> ModelConfig:
    """Return the `model` section of an experiment alone, as `validate` does."""
    try:
        # repr: a Python caller may give any object; as a string it is refused by its key.
        return _MODEL.validate_json(json.dumps(raw, default=repr), strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        for problem in problems:
            # So that messages name keys as the experiment file does.
            problem["loc"] = ("model", *problem["loc"])
        raise ConfigError(explain(problems, source)) from None


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) from `--a.b=c` and `--a.b c` arguments."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            raise ConfigError(
                f"unexpected argument {argument!r}; overrides are written --section.key=value, "
                "for example --train.lr=2e-4"
            )
        if not equals:
            # What looks like the next override is no value: it would be lost in silence.
            if not rest or rest[0].startswith("--"):
                before = f" before {rest[0]}" if rest else ""
                raise ConfigError(f"override --{key} has no value{before}; write --{key}=VALUE")
            text = rest.pop(0)
        yield key, _parse_value(text)


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as plain JSON data: every default filled in, local paths absolute.

    This is what `config show` prints and what config.json, checkpoints and MLflow keep, so that a
    run's commands work from any folder. Secrets are left out.
    """
    data = filled_in(experiment)
    for key in PATHS:
        section, _, name = key.rpartition(".")
        node = data[section] if section else data
        if node[name] is not None:
            node[name] = _absolute(node[name])
    vae = data["evaluation"]["vae"]
    if vae and Path(vae).is_dir():  # else it is a hub's name
        data["evaluation"]["vae"] = _absolute(vae)
    return data


def filled_in(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as `resolved` does, with paths as they were given."""
    data = experiment.model_dump(mode="json", by_alias=True)
    # Made from the name where it is not given, and with the folder of an expert.
    data["run_dir"] = str(experiment.run_path)
    options = data["data"]["storage_options"]
    kept = {k: v for k, v in options.items() if k not in SECRETS}
    if isinstance(endpoint := kept.get("endpoint_url"), str):
        kept["endpoint_url"] = without_password(endpoint)
    data["data"]["storage_options"] = kept
    if uri := data["tracking"]["uri"]:
        data["tracking"]["uri"] = without_password(uri)
    return data


def _absolute(place: str) -> str:
    """Return a local path, also that in the URI of an SQLite file, from the root on."""
    if found := _SQLITE_FILE.match(place):
        return found[0] + str(Path(place.removeprefix(found[0])).absolute())
    return place if _NO_PATH.match(place) else str(Path(place).absolute())


def _read_json(path: Path, what: str, example: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_marking_twice)
    except OSError as error:
        raise ConfigError(
            f"cannot read {what} {str(path)!r}: {error.strerror}; "
            f"give a JSON file, for example {example}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; {what} is a JSON object")
    if keys := list(_twice(raw)):
        told = "stands twice, and the first would have no effect; make them one"
        raise ConfigError("\n".join(f"{path}: {key} {told}" for key in keys))
    return raw


def _marking_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object in which a key that stands twice is marked: json drops the first."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        made[key] = _TWICE if key in made else value
    return made


def _twice(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of each value that is marked."""
    for key, value in node.items():
        if value is _TWICE:
            yield prefix + key
        elif isinstance(value, dict):
            yield from _twice(value, f"{prefix}{key}.")


def _parse_value(text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except ValueError:
        return text


def _set(raw: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override --{key}: {section!r} is a value, not a section")
    node[last] = value
