"""Ten thousand requests in one engine leave nothing behind."""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

GROWTH_MIB = 64
"""By so much more may the resident memory grow over 10,000 requests, of which 6,000 and more are
traced, than it does where none is: vLLM 0.28 itself grows by some 20 KB a request here."""
OWN_GROWTH_KIB = 256
"""And so much may be held by what the package allocates itself: the traces have 4 MiB."""


def test_ten_thousand_requests_leave_no_entry_and_no_growth(run_engines):
    on, off = (run_engines("engine_soak.py", asking).soak for asking in ("on", "off"))
    growth_on, growth_off = (run["resident_mib"][-1] - run["resident_mib"][0] for run in (on, off))
    print(f"growth_mib on {growth_on:.0f} off {growth_off:.0f} {on}")
    assert on["requests"] >= 10_000 and off["requests"] >= 10_000
    assert on["aborted"] >= 1_000 and on["joined"] >= 300
    assert on["traced"] == on["asked"] > 6_000
    empty = ("tracked", "held", "held_bytes", "waiting", "given_up")
    assert [on["after"][name] for name in empty] == [0] * len(empty)
    assert on["after"] == on["before"]
    counters = dict(on["counters"])
    assert counters.pop("received") == on["asked"]
    assert not any(counters.values())
    assert growth_on - growth_off < GROWTH_MIB
    assert on["own_kib"][1] - on["own_kib"][0] < OWN_GROWTH_KIB
