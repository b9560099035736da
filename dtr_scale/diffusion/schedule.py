"""Make noise schedules, and choose the timesteps that shortened sampling keeps."""

from collections.abc import Sequence

import numpy as np

from dtr_scale.errors import ConfigError

NOISE_SCHEDULES = ("linear", "cosine")


def beta_schedule(name: str, num_timesteps: int) -> np.ndarray:
    """Return beta_t, float64 [T].

    "linear" (Ho et al., 2020) goes from 1e-4 to 0.02 at T = 1000 and scales with 1000/T.
    "cosine" (Nichol & Dhariwal, 2021, eq. 17) follows cos^2 with s = 0.008 and beta <= 0.999.
    Raises ConfigError for another name.
    """
    if name == "linear":
        if num_timesteps <= 20:
            raise ConfigError(
                f"diffusion.num_timesteps = {num_timesteps}: too few for the linear schedule, "
                "whose last beta would reach 1; give 21 or more, or the cosine schedule"
            )
        scale = 1000 / num_timesteps
        return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps)
    if name == "cosine":
        time = np.linspace(0, 1, num_timesteps + 1)
        alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    accepted = ", ".join(NOISE_SCHEDULES)
    raise ConfigError(f"diffusion.noise_schedule = {name!r}: unknown; give one of {accepted}")


def space_timesteps(
    num_timesteps: int,
    respacing: str | int | Sequence[int] | None,
    key: str = "timestep_respacing",
) -> np.ndarray:
    """Return the kept timesteps, ascending int64, as in improved-diffusion.

    "250" (or 250) spreads 250 steps from the first timestep to the last; "10,20,30" (or a list)
    does so in three equal sections; "ddim25" takes 25 steps at one whole-number stride; "" or None
    keeps all. Raises ConfigError, which names the setting by its `key`, for what does not fit.
    """
    given = respacing
    if isinstance(respacing, Sequence) and not isinstance(respacing, str):
        respacing = ",".join(map(str, respacing))
    respacing = "" if respacing is None else str(respacing)
    if respacing == "":
        return np.arange(num_timesteps)
    try:
        if respacing.startswith("ddim"):
            return _constant_stride(num_timesteps, _count(respacing.removeprefix("ddim")))
        counts = [_count(count) for count in respacing.split(",")]
        # array_split gives the first sections what does not divide, as improved-diffusion.
        sections = np.array_split(np.arange(num_timesteps), len(counts))
        return np.concatenate(
            [_spread(section, count) for section, count in zip(sections, counts, strict=True)]
        )
    except ValueError as error:
        raise ConfigError(f"{key} = {given!r}: {error}") from None


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{text!r} is no number of steps; give e.g. '250', 'ddim50' or '10,20,30'")
    return int(text)


def _constant_stride(num_timesteps: int, count: int) -> np.ndarray:
    # Of the strides that keep as many timesteps the smallest counts: it comes last.
    strides = {-(-num_timesteps // stride): stride for stride in range(num_timesteps - 1, 0, -1)}
    if count not in strides:
        nearest = min(strides, key=lambda kept: abs(kept - count))
        raise ValueError(
            f"no whole-number stride keeps {count} of {num_timesteps} timesteps; give "
            f"'ddim{nearest}', the nearest"
        )
    return np.arange(0, num_timesteps, strides[count])


def _spread(section: np.ndarray, count: int) -> np.ndarray:
    if not 1 <= count <= len(section):
        fitting = f"at most {len(section)}" if count > 1 else "at least 1, of at least 1"
        raise ValueError(f"{count} steps of {len(section)} timesteps; choose {fitting}")
    stride = (len(section) - 1) / max(count - 1, 1)
    # Added up, not multiplied: the original rounds the running sum, and ties depend on it.
    places = np.cumsum(np.append(0.0, np.full(count - 1, stride)))
    return section[np.round(places).astype(np.int64)]
