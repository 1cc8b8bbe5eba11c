"""The device that a user names, tried before anything is loaded onto it."""

import torch

from vlm.errors import ConfigError


def usable_device(wanted: str | torch.device | None) -> torch.device:
    """The device; for None a GPU where there is one, else the CPU.

    Raises:
        ConfigError: it cannot be used.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(wanted)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device {str(wanted)!r} cannot be used ({reason}); give cpu, or cuda where there is a GPU."
        ) from None
    return place
