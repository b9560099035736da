"""Define the field types of an experiment's sections, and how a section refuses its values."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
HalfOpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
# Power functions have widths below 12^-0.5 = 0.289 (Karras et al., 2024, eq. 126, gamma = 0).
RelativeWidth = Annotated[float, Field(gt=0.0, lt=0.28)]


def whole(value: Any) -> Any:  # noqa: ANN401
    """Take 1e3, which JSON reads as a float, for the whole number that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# After the bounds, or the JSON Schema would not have them.
Whole = BeforeValidator(whole)
Int = Annotated[int, Whole]
PositiveInt = Annotated[int, Field(ge=1), Whole]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=0), Whole]
Seed = Annotated[int, Field(ge=0, lt=2**64), Whole]
"""torch.manual_seed takes no others."""

SectionOrFile = Annotated[
    dict[str, Any] | None, WithJsonSchema({"type": ["object", "string", "null"]})
]
"""An object, or in an experiment file the path of one; `load_experiment` reads it."""


class Section(BaseModel):
    # The strings below fields are descriptions in configs/experiment.schema.json, which a test
    # compares: changing one means writing that file anew.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def refuse(message: str) -> PydanticCustomError:
    """A cross-field error whose message already names its keys."""
    # The message goes in as a value: braces in it would be taken for a template's.
    return PydanticCustomError("combination", "{text}", {"text": message})


def local_path(path: str | None) -> str | None:
    if path is not None and "://" in path:
        raise PydanticCustomError(
            "local_path", "must be a local folder; checkpoints can go to s3:// by checkpoint.dir"
        )
    return path


def comma_separated(keys: Any) -> Any:  # noqa: ANN401
    return keys.split(",") if isinstance(keys, str) else keys


def renamed(data_type: Any) -> Any:  # noqa: ANN401
    """Read the name that `data.type` had when shards held latents alone, as older runs keep it."""
    return "shards" if data_type == "latents" else data_type
