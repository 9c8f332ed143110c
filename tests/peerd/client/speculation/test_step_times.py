"""Measured times of steps with drafted positions."""

from peerd.client.speculation.step_times import MOST_DRAFTED, StepTimes


def test_nothing_is_assumed_before_something_was_measured():
    times = StepTimes()
    assert (times.known, times.allowed, times.ratio(8)) == (0, 1, 1.0)


def test_what_is_doubted_is_soon_replaced():
    times = StepTimes()
    times.doubt()
    assert times.known == 0
    for size in (2, 4, 8):
        for _ in range(20):
            times.note(size, 1 + 3 * size)
    times.doubt()
    assert (times.known, times.ratio(2), times.ratio(8)) == (2, 7.0, 25.0)
    times.note(2, 1.0)
    assert times.ratio(2) == 4.0


def test_twice_as_many_as_were_measured_are_allowed():
    times = StepTimes()
    allowed = []
    for _ in range(7):
        allowed.append(times.allowed)
        times.note(times.allowed, 1.0)
    assert allowed == [1, 2, 4, 8, 16, MOST_DRAFTED, MOST_DRAFTED]


def test_between_measured_sizes_it_interpolates_and_beyond_them_it_goes_on():
    times = StepTimes()
    times.note(4, 1.4)
    times.note(16, 2.6)
    assert [round(times.ratio(size), 4) for size in (2, 4, 10, 16, 31)] == [1.2, 1.4, 2.0, 2.6, 4.1]


def test_noise_makes_no_larger_step_cheaper_than_a_smaller_one():
    times = StepTimes()
    times.note(2, 1.5)
    times.note(8, 1.1)
    ratios = [times.ratio(size) for size in range(MOST_DRAFTED + 1)]
    assert ratios == sorted(ratios)


def test_new_measurements_replace_old_ones():
    times = StepTimes()
    for _ in range(20):
        times.note(4, 1.0)
    for _ in range(20):
        times.note(4, 3.0)
    assert times.ratio(4) > 2.9
