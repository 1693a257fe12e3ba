"""Even intervals, by a clock that takes no time."""

import pytest
from simulated_clock import SimulatedClock

from streamflow.live.pacing import Pacer


def played(arrivals, period=1.0, slots=10, takes=0.0):
    """Run a pacer whose images arrive at these times: [(time, image) shown]. takes: seconds of each showing."""
    clock, shown, waiting = SimulatedClock(), [], sorted(arrivals)

    def take():
        there = [name for at, name in waiting if at <= clock.now() + 1e-9]
        del waiting[: len(there)]
        return there[-1] if there else None

    def show(picture):
        shown.append((clock.now(), picture))
        clock.advance(takes(len(shown)) if callable(takes) else takes)

    pacer = Pacer(period, clock)
    pacer.run(take, show, lambda: len(shown) < slots)
    return pacer, shown


def test_images_are_shown_at_exact_multiples_whatever_their_arrival():
    pacer, shown = played([(0.4 + 0.77 * k, k) for k in range(40)], period=0.8, slots=25, takes=0.3)
    start = shown[0][0]
    assert [at for at, _ in shown] == pytest.approx([start + 0.8 * k for k in range(25)])
    assert (pacer.shown, pacer.repeated, pacer.late, pacer.skipped) == (25, 0, 0, 0)
    assert len(pacer.intervals) == 24 and list(pacer.intervals) == pytest.approx([0.8] * 24)


def test_what_is_late_is_shown_when_it_is_there_and_the_last_one_again_until_then():
    pacer, shown = played([(0, "a"), (1, "b"), (3.5, "c"), (5, "d")], slots=8)
    assert [picture for _, picture in shown] == ["a", "b", "b", "b", "c", "d", "d", "d"]
    assert (pacer.shown, pacer.repeated, pacer.late) == (8, 4, 1)
    assert pacer.shown - pacer.repeated == len({picture for _, picture in shown})


def test_multiples_that_went_by_are_left_out_and_the_clock_stays_in_step():
    """The third showing takes 3.4 periods; those at 3 and 4 are gone, 5 comes late, and 6 is in time again."""
    pacer, shown = played([(k, k) for k in range(20)], slots=7, takes=lambda n: 3.4 if n == 3 else 0.1)
    assert [at for at, _ in shown] == pytest.approx([0, 1, 2, 5.4, 6, 7, 8])
    assert pacer.skipped == 2 and pacer.shown == 7


def test_a_new_period_acts_from_the_next_image_on_and_is_kept_exactly():
    clock, shown = SimulatedClock(), []
    pacer = Pacer(1.0, clock)

    def show(number):
        shown.append(clock.now())
        pacer.period = {3: 0.25, 7: 2.0}.get(len(shown), pacer.period)

    pacer.run(iter(range(99)).__next__, show, lambda: len(shown) < 9)
    assert shown == pytest.approx([0, 1, 2, 2.25, 2.5, 2.75, 3.0, 5.0, 7.0])
    assert pacer.repeated == pacer.skipped == 0


@pytest.mark.parametrize("period", [0, -1, float("inf"), float("nan")])
def test_a_period_is_a_positive_time(period):
    with pytest.raises(ValueError, match="positive number of seconds"):
        Pacer(period, SimulatedClock())
