"""What values of the command line's arguments are accepted, as argparse's types."""

import argparse


def positive_integer(text: str) -> int:
    """Return a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a whole number from 1")
    return int(text)


def positive_number(text: str) -> float:
    """Return a number above 0."""
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a number above 0")
    return number


def fraction(text: str) -> float:
    """Return a number from 0 to 1."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a number from 0 to 1")
    return number


def split_name(text: str) -> str:
    """Return a name that can begin a shard's name."""
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a name such as train")
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
