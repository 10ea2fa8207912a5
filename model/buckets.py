"""The padded lengths that programs are compiled for: few, and not much longer than needed."""


def bucket(length: int, step: int = 32) -> int:
    """The padded length that is compiled for `length`: a multiple of `step`; above 16 · `step`, a
    multiple of a larger number, about a sixteenth to an eighth of the length."""
    while length > 16 * step:
        step *= 2
    return -(-length // step) * step


def coarse_bucket(length: int) -> int:
    """64, 96, 128, 192, 256, …: for programs that cost more to compile than padding costs to
    compute."""
    power = 64
    while power < length:
        power *= 2
    return power * 3 // 4 if 64 < length <= power * 3 // 4 else power
