"""Formulas that differ at a point, so that no simplification can make them equal.

Contract: runs in the answers' workers. math-verify's last resort is to simplify the difference of
two formulas, which takes milliseconds and seldom finds anything; here both are first computed at
one point, in floats with a bound on what rounding can do. `apart` says True only far beyond that
bound, of sums, products and powers of numbers and variables alone; of all else it says False, which
means nothing. The variables are positive there, where the rules by which roots are simplified hold.
"""

from collections.abc import Callable, Mapping
from typing import Any

_MOST_NODES = 200
_LARGEST_EXPONENT = 10.0
_CANCELLED = 1e-3
"""Below this part of what it is made of, a base is taken for a zero that rounding hides."""
_BOUND = 1e-9
"""Rounding's share of the scale of a value, with six digits to spare."""


class _NotComputedError(Exception):
    pass


def unless_apart(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """`equal`, asked only about what may be equal."""
    return lambda a, b: not apart(a, b) and equal(a, b)


def apart(a: Any, b: Any) -> bool:
    """Whether two sympy objects are known to differ; False also where they cannot be computed."""
    symbols = sorted(getattr(a, "free_symbols", set()) | getattr(b, "free_symbols", set()), key=str)
    point = {symbol: 0.5772 + 0.4142 * i for i, symbol in enumerate(symbols)}
    try:
        (value_a, scale_a), (value_b, scale_b) = (_value(x, point, [_MOST_NODES]) for x in (a, b))
    except (_NotComputedError, OverflowError):
        return False
    return bool(abs(value_a - value_b) > _BOUND * (scale_a + scale_b))


def _value(node: Any, point: Mapping[Any, float], left: list[int]) -> tuple[float, float]:
    """Its value, and a scale: rounding is off by a few 1e-16 of it. `left` are the nodes it may
    still have."""
    import sympy

    left[0] -= 1
    if left[0] < 0:
        raise _NotComputedError
    if isinstance(node, sympy.Symbol):
        return point[node], point[node]
    if isinstance(node, sympy.Number | sympy.NumberSymbol):
        value = float(node)
        return value, abs(value)
    if not isinstance(node, sympy.Add | sympy.Mul | sympy.Pow):
        raise _NotComputedError
    parts = [_value(part, point, left) for part in node.args]
    if isinstance(node, sympy.Pow):
        return _power(*parts)
    value, scale = parts[0]
    for v, s in parts[1:]:
        if isinstance(node, sympy.Add):
            value, scale = value + v, scale + s
        else:
            value, scale = value * v, scale * s
    return value, scale


def _power(base: tuple[float, float], exponent: tuple[float, float]) -> tuple[float, float]:
    """Where it is a smooth function of the base, which must be neither near zero nor, for a root,
    negative."""
    (b, scale), (e, _) = base, exponent
    if abs(e) > _LARGEST_EXPONENT:
        raise _NotComputedError
    if e.is_integer() and e >= 0:
        return b**e, scale**e
    if (abs(b) if e.is_integer() else b) <= _CANCELLED * scale:
        raise _NotComputedError
    value = b**e
    return value, abs(value) / _CANCELLED
