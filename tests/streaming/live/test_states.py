"""The table of states: every path through it is possible, what is not in it is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.live.states import TABLE, Cause, State, next_state


@given(st.lists(st.sampled_from(list(Cause)), max_size=40))
def test_a_session_is_always_in_one_state_and_closed_for_ever(causes: list[Cause]) -> None:
    state = State.IDLE
    for cause in causes:
        if (state, cause) in TABLE:
            state = next_state(state, cause)
        else:
            with pytest.raises(ValueError, match=r"^cause: .* cannot happen while"):
                next_state(state, cause)
    if Cause.CLOSE in causes:
        assert state == State.CLOSED


def test_every_state_can_be_reached_and_closed() -> None:
    reached = {State.IDLE}
    while new := {after for (before, _), after in TABLE.items() if before in reached} - reached:
        reached |= new
    assert reached == set(State)
    assert all(TABLE[state, Cause.CLOSE] == State.CLOSED for state in State)


def test_an_interrupted_session_shows_nothing_before_it_is_something_else() -> None:
    left = {cause for (before, cause), after in TABLE.items() if before == State.INTERRUPTED and after != before}
    assert left == {Cause.SPEECH_FRAME, Cause.WAITING_FRAME, Cause.IDLE_FRAME, Cause.CLOSE}
