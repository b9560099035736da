"""Say what is wrong with an experiment, a line each: key = value: what is wrong; what to give."""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from dtr_scale.config.schema import Experiment

# Parts that pydantic adds to a location: the branch of a union that it tried.
_BRANCH = re.compile(r"(int|float|str|(constrained|function|literal|nullable)[-\[].*)")

_NAMING_SEVERAL = ("combination", "union_tag_invalid", "union_tag_not_found")

_PATTERNS = {
    "name": "is a folder's name; give letters, digits, '.', '_' and '-', a letter or digit first",
    "evaluation.num_sampling_steps": "or a whole-number stride as 'ddim50'",
}


def explain(problems: Sequence[Any], source: str, overrides: Collection[str] = ()) -> str:
    """Return pydantic's problems with an experiment from `source`, a line each.

    `overrides` are the keys that the command line gave: what is wrong with them is its mistake.
    """
    # A value that fits no branch of a union is one problem per branch.
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        by_key.setdefault(_key(problem["loc"]), []).append(problem)
    lines: list[str] = []
    for key, of_key in by_key.items():
        for told in _explain(key, of_key).splitlines():
            # Settings that do not fit each other are told by the name of each.
            about = told if of_key[0]["type"] in _NAMING_SEVERAL else key
            given = any(_is_about(override, key, about) for override in overrides)
            lines.append(f"{'the command line' if given else source}: {told}")
    return "\n".join(lines)


def _is_about(override: str, key: str, about: str) -> bool:
    """Tell whether a problem with `key`, and with the keys in `about`, is an override's."""
    return f"{key}.".startswith(f"{override}.") or bool(
        re.search(rf"(?<![\w.]){re.escape(override)}(?![\w.]*\w)", about)
    )


def known_keys() -> list[str]:
    """Return every key of an experiment, dotted."""
    return list(dict.fromkeys(_keys(Experiment)))


def suggestion(key: str) -> str:
    """Name the nearest known key, or the section's keys where none is near."""
    # Without what the key lies below: `name` would be no advice for name.x.
    known = [k for k in known_keys() if not key.startswith(f"{k}.")]
    section, _, name = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    by_name = {k.rpartition(".")[2]: k for k in known}
    # First the whole key with a typing error, then its name in a wrong section.
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if not near and (name in by_name or not siblings or not section):
        near = [by_name[n] for n in difflib.get_close_matches(name, list(by_name), 1, 0.75)]
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(siblings)}"


def _explain(key: str, problems: Sequence[Any]) -> str:
    problem = problems[0]
    kind = problem["type"]
    if kind == "combination":
        return problem["msg"]
    if kind == "extra_forbidden" and key in known_keys():
        section = key.partition(".")[0]
        return f"{key} is a setting of another {section}.type; remove it, or change the type"
    if kind == "extra_forbidden":
        return f"unknown key {key}{suggestion(key)}"
    if kind == "json_invalid":  # what was given is the whole experiment, secrets included
        return "holds text that is not Unicode; give other text"
    if kind == "missing" and isinstance(problem["loc"][-1], int):
        given = json.dumps(problem["input"])
        return f"{key.rpartition('.')[0]} = {given}: a value is missing"
    if kind == "missing":
        return f"{key} is missing"
    if kind.startswith("union_tag"):
        tag = problem["ctx"].get("tag")
        found = "is missing" if tag is None else f"= {json.dumps(tag)} is unknown"
        return f"{key}.type {found}; accepted are {', '.join(_known_types(key))}"
    accepted = " ".join(dict.fromkeys(_accepted(key, problem) for problem in problems))
    if key.startswith("data.storage_options"):
        return f"{key}: {accepted}"  # what was given may hold a secret
    return f"{key} = {json.dumps(problem['input'])}: {accepted}"


def _accepted(key: str, problem: Any) -> str:  # noqa: ANN401
    if problem["type"] == "string_pattern_mismatch":
        return _PATTERNS[key]
    if problem["type"] in ("too_long", "too_short"):
        limits = {"max_length": "at most", "min_length": "at least"}
        ctx = problem["ctx"]
        bound = next(f"{word} {ctx[name]}" for name, word in limits.items() if name in ctx)
        return f"should have {bound} values, not {ctx['actual_length']}"
    told = problem["msg"].removeprefix("Input ")
    if problem["type"] == "literal_error":  # as JSON has them
        told = told.replace("True", "true").replace("False", "false")
    return told


def _key(location: Sequence[str | int]) -> str:
    """Return a location as the file has it: pydantic puts a network's type after "model"."""
    parts = [part for i, part in enumerate(location) if not (i == 1 and location[0] == "model")]
    return ".".join(str(p) for p in parts if isinstance(p, int) or not _BRANCH.fullmatch(p))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + (field.alias or name)
        for section in get_args(field.annotation) or [field.annotation]:
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from _keys(section, f"{prefix}{name}.")


def _known_types(section: str) -> list[str]:
    """Return the `type`s of a section that is one of several."""
    options = get_args(Experiment.model_fields[section].annotation)
    return [get_args(option.model_fields["type"].annotation)[0] for option in options]
