"""Who may do what: tokens, tickets, origins, and where a server may listen."""

import pytest

from model.errors import UserError
from streaming.serve.access import Access, bearer, is_loopback, token_for
from streaming.serve.errors import RefusedError
from streaming.serve.limits import Bucket, Limits


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def access(clock: Clock | None = None) -> Access:
    made = Access("the-token", ["https://friend.example"], Limits())
    made._now = clock or Clock()
    return made


def code(error: pytest.ExceptionInfo[RefusedError]) -> str:
    return error.value.code


def test_only_the_token_opens() -> None:
    made = access()
    made.check_token({"Authorization": "Bearer the-token"}, "a")
    for wrong in (
        {},
        {"Authorization": "Bearer the-toke"},
        {"Authorization": "Basic the-token"},
        {"Authorization": "ü"},
    ):
        with pytest.raises(RefusedError) as error:
            made.check_token(wrong, str(wrong))
        assert code(error) == "unauthorised"


def test_who_guesses_has_to_wait_and_others_have_not() -> None:
    clock = Clock()
    made = access(clock)
    codes = []
    for _ in range(30):
        with pytest.raises(RefusedError) as error:
            made.check_token({"Authorization": "Bearer guess"}, "bad")
        codes.append(code(error))
    assert codes.count("unauthorised") == 1 + Limits().wrong_tokens_per_minute
    assert codes[-1] == "too_many"
    made.check_token({"Authorization": "Bearer the-token"}, "good")
    clock.time += 60
    made.check_token({"Authorization": "Bearer the-token"}, "bad")


def test_a_ticket_is_good_once_for_its_session_and_soon() -> None:
    clock = Clock()
    made = access(clock)
    ticket = made.ticket("one")
    made.use_ticket("one", ticket)
    stolen, late = made.ticket("one"), made.ticket("one")
    for session, wrong in (("one", ticket), ("other", stolen), ("one", stolen), ("one", "guess")):
        with pytest.raises(RefusedError):
            made.use_ticket(session, wrong)
    clock.time += 31
    with pytest.raises(RefusedError):
        made.use_ticket("one", late)
    made.ticket("one")
    assert len(made._tickets) == 1  # those that nobody used are forgotten


def test_pages_of_other_sites_may_not_ask() -> None:
    made = access()
    assert made.check_origin({"Host": "127.0.0.1:8700"}) is None  # no page
    assert made.check_origin({"Host": "127.0.0.1:8700", "Origin": "http://127.0.0.1:8700"}) is None
    assert made.check_origin({"Host": "a", "Origin": "https://friend.example"}) == "https://friend.example"
    friendly = "https://friend.example"
    for origin in ("https://evil.example", "http://127.0.0.1:9000", "null", f"{friendly}.evil", "http://[", ""):
        with pytest.raises(RefusedError) as error:
            made.check_origin({"Host": "127.0.0.1:8700", "Origin": origin})
        assert code(error) == "forbidden_origin"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.168.1.5", False), ("example.com", False)],
)  # fmt: skip
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_an_open_server_needs_a_long_token_and_a_closed_one_gets_a_new_one() -> None:
    assert token_for("127.0.0.1", "short") == "short"
    assert token_for("127.0.0.1", "") != token_for("127.0.0.1", "")
    assert len(token_for("127.0.0.1", "")) >= 32
    with pytest.raises(UserError, match=r"--host 0.0.0.0 is open to the network: set \$FLASHTALK_TOKEN"):
        token_for("0.0.0.0", "")
    with pytest.raises(UserError, match=r"has 5 characters; --host 0.0.0.0 needs 16"):
        token_for("0.0.0.0", "short")
    assert token_for("0.0.0.0", "x" * 16) == "x" * 16


def test_bearer_reads_the_header() -> None:
    assert bearer({"Authorization": "bearer  abc "}) == "abc"
    assert bearer({"Authorization": "abc"}) == bearer({}) == ""


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    clock = Clock()
    bucket = Bucket(2, 5, clock)
    assert [bucket.take() for _ in range(7)] == [True] * 5 + [False] * 2
    clock.time += 1
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    assert not bucket.is_full
    clock.time += 10
    assert bucket.is_full


def test_a_bucket_of_less_than_one_event_lets_one_through_in_time() -> None:
    clock = Clock()
    bucket = Bucket(0.5 / 60, 0.5, clock)
    assert [bucket.take(), bucket.take()] == [True, False]
    clock.time += 121
    assert [bucket.take(), bucket.take()] == [True, False]
