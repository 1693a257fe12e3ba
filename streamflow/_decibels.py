"""The scale of PSNR."""

import math


def decibels(error: float) -> float:
    """PSNR in dB of a mean square error that is relative to the square of the range of values. Infinite for equal values,
    and minus infinity for an error that is not finite."""
    return math.inf if error == 0 else -10 * math.log10(error) if math.isfinite(error) else -math.inf
