"""Read an experiment: a JSON file, then dotted overrides, then validation."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.logs import without_password

SECRETS = frozenset({"key", "secret", "token"})
"""Names in data.storage_options that are used and never written anywhere."""


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment in `path` with `overrides` applied.

    Overrides are `--section.key=value` or `--section.key value`; a value is read as JSON, and as
    a string where it is not JSON. Raises ConfigError, in one line.
    """
    raw = _read_json(Path(path), "the experiment file", example="configs/demo_digits.json")
    for key, value in parse_overrides(overrides):
        _set(raw, key, value)
    engine = raw.get("engine")
    if isinstance(engine, dict) and isinstance(engine.get("deepspeed_config"), str):
        # Here, so that the config which a run keeps is complete.
        place = "engine.deepspeed_config"
        engine["deepspeed_config"] = _read_json(
            Path(engine["deepspeed_config"]), place, example="deepspeed.json"
        )
    return validate(raw, source=str(path))


def validate(raw: dict[str, Any], source: str) -> Experiment:
    """Return `raw` as an Experiment; ConfigError names the first thing wrong and its fix."""
    try:
        # Strict JSON mode: "8" is no integer and true is no step count.
        experiment = Experiment.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        message = _explain(problems[0], raw)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {message}{more}") from None
    for key in experiment.checkpoint.allow_changes:
        if key not in _known_keys(Experiment):
            raise ConfigError(
                f"{source}: checkpoint.allow_changes names an unknown key {key}{_suggestion(key)}"
            )
    return experiment


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
            if not rest:
                raise ConfigError(f"override --{key} has no value; write --{key}=VALUE")
            text = rest.pop(0)
        yield key, _parse_value(text)


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as plain JSON data, every default filled in, secrets left out.

    This is what `config show` prints and what config.json, checkpoints and MLflow keep.
    """
    data = experiment.model_dump(mode="json", by_alias=True)
    data["run_dir"] = str(experiment.run_path)
    options = data["data"]["storage_options"]
    kept = {k: v for k, v in options.items() if k not in SECRETS}
    if isinstance(endpoint := kept.get("endpoint_url"), str):
        kept["endpoint_url"] = without_password(endpoint)
    data["data"]["storage_options"] = kept
    if uri := data["tracking"]["uri"]:
        data["tracking"]["uri"] = without_password(uri)
    return data


def _read_json(path: Path, what: str, example: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {what} {str(path)!r}: {error.strerror}; "
            f"give a JSON file, for example {example}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; {what} is a JSON object")
    return raw


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


def _explain(problem: Any, raw: dict[str, Any]) -> str:  # noqa: ANN401
    """Turn one pydantic problem into: key, value, what is accepted."""
    key = ".".join(str(part) for part in _written(problem["loc"]))
    kind = problem["type"]
    if kind == "combination":
        return problem["msg"]
    if kind == "extra_forbidden":
        return f"unknown key {key}{_suggestion(key)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind.startswith("union_tag"):
        tag = problem["ctx"].get("tag")
        found = "is missing" if tag is None else f"= {json.dumps(tag)} is unknown"
        return f"{key}.type {found}; accepted are {', '.join(_known_types(key))}"
    accepted = problem["msg"].removeprefix("Input ")
    if key.startswith("data.storage_options"):
        return f"{key}: {accepted}"  # what was given may hold a secret
    return f"{key} = {json.dumps(problem['input'])}: {accepted}"


def _written(location: Sequence[str | int]) -> list[str | int]:
    """Return a location as the file has it: pydantic puts a network's type after "model"."""
    return [part for i, part in enumerate(location) if not (i == 1 and location[0] == "model")]


def _suggestion(key: str) -> str:
    """Name the nearest known key: by its full path, else by its last part alone."""
    known = list(dict.fromkeys(_known_keys(Experiment)))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if not near:
        by_name = {k.rpartition(".")[2]: k for k in known}
        last = key.rpartition(".")[2]
        near = [by_name[n] for n in difflib.get_close_matches(last, list(by_name), 1, 0.75)]
    if near:
        return f"; did you mean {near[0]}?"
    section = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    return f"; known are {', '.join(siblings)}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + (field.alias or name)
        for section in get_args(field.annotation) or [field.annotation]:
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from _known_keys(section, f"{prefix}{name}.")


def _known_types(section: str) -> list[str]:
    """Return the `type`s of a section that is one of several."""
    options = get_args(Experiment.model_fields[section].annotation)
    return [get_args(option.model_fields["type"].annotation)[0] for option in options]
