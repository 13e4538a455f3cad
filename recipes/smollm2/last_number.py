"""A verifier of one's own: the answer is the last number of the text.

    PYTHONPATH=recipes/smollm2 pivottrace init RUN ... --answers last_number:LastNumber

`math` would not do for these tasks: it compares formulas by their value, so that a rollout which
only says the question again ("the sum 58 + 26") passes for its answer.
"""

from __future__ import annotations

import re

from pivottrace_verl.answer_numbers import read_number, write_number

# A minus sign right after an operand takes away; it is none of the number.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?")


class LastNumber:
    """Numbers, equal if their values are."""

    canonical_decides = True

    def extract(self, text: str) -> str | None:
        """The last number, in the spelling of `canonical`."""
        found = _NUMBER.findall(text)
        return self.canonical(found[-1]) if found else None

    def canonical(self, label: str) -> str | None:
        """The number in one spelling; None if the label is none."""
        number = read_number(label)
        return None if number is None else write_number(number)

    def equal(self, a: str, b: str) -> bool:
        """Whether both are numbers of one value."""
        left = self.canonical(a)
        return left is not None and left == self.canonical(b)
