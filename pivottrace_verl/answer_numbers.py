"""Plain numbers: the answers that need no computer algebra.

Contract: `read_number` reads integers (1,000 too), decimals and fractions of integers exactly, and
nothing else; what it leaves out is for math-verify. `same_number` says what math-verify says, or
None where that hangs on how a decimal is rounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_LONGEST = 60
_SIGN = r"(?P<sign>[+-]?)\s*"
_INTEGER = re.compile(_SIGN + r"(?P<digits>[1-9][0-9]{0,2}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)")
_DECIMAL = re.compile(_SIGN + r"(?P<whole>[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)\.(?P<part>[0-9]+)")
_FRACTION = re.compile(
    _SIGN
    + r"(?:\\[dt]?frac\s*\{(?P<a>-?[0-9]+)\}\s*\{(?P<b>[0-9]+)\}"
    + r"|\\[dt]?frac(?P<c>[0-9])(?P<d>[0-9])"
    + r"|(?P<e>[0-9]+)\s*/\s*(?P<f>[0-9]+))"
)
_ROUNDED = Fraction(2, 10**6)
"""math-verify rounds decimals to six places: numbers further apart than this differ."""


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    decimal: bool
    """Whether it has a decimal point, so that it is compared as rounded."""


@lru_cache(maxsize=65536)
def read_number(text: str) -> Number | None:
    """The number, or None if the text is not just one number in plain writing."""
    text = text.strip().replace("−", "-")
    if not text or len(text) > _LONGEST or not text.isascii():
        return None
    if found := _INTEGER.fullmatch(text):
        digits = found["digits"].replace("{,}", "").replace(",", "")
        return Number(_signed(found["sign"], Fraction(int(digits))), False)
    if found := _DECIMAL.fullmatch(text):
        digits = found["whole"].replace(",", "") + found["part"]
        value = Fraction(int(digits), 10 ** len(found["part"]))
        # Beyond these, math-verify's own precision is in play.
        plain = len(digits) <= 12
        return Number(_signed(found["sign"], value), True) if plain else None
    if found := _FRACTION.fullmatch(text):
        above, below = (
            next(int(n) for n in (found[x], found[y], found[z]) if n is not None)
            for x, y, z in (("a", "c", "e"), ("b", "d", "f"))
        )
        return Number(_signed(found["sign"], Fraction(above, below)), False) if below else None
    return None


def same_number(a: Number, b: Number) -> bool | None:
    """Whether math-verify calls them equal; None if that depends on rounding."""
    if a.value == b.value:
        return True
    if (a.decimal or b.decimal) and abs(a.value - b.value) <= _ROUNDED:
        return None
    return False


def write_number(number: Number) -> str:
    """One spelling: 1000, 0.5 (a decimal stays one), \\frac{1}{2} in lowest terms."""
    value = number.value
    sign = "-" if value < 0 else ""
    if value.denominator == 1:
        return str(value.numerator)
    if not number.decimal:
        return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    places = next(n for n in range(1, 13) if 10**n % value.denominator == 0)
    whole, part = divmod(abs(value.numerator) * (10**places // value.denominator), 10**places)
    return f"{sign}{whole}.{part:0{places}d}"


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value
