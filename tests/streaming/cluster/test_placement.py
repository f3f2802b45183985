"""Which replica gets a session: room, reports, deaths, places that are kept. In virtual time."""

import pytest

from streaming.cluster.placement import LOST, RESERVED, SETTLED, Placement, Replica, Report, fitting
from streaming.cluster.scaling import wanted
from streaming.serve.errors import RefusedError


class Cluster:
    """A placement, its clock, and replicas that report."""

    def __init__(self, overcommit: bool = False) -> None:
        self.now = 100.0
        self.placement = Placement(lambda: self.now, overcommit)
        self.lost: list[str] = []
        self.placement.on_lost = lambda replica: self.lost.append(replica.name)

    def report(
        self, name: str, *sessions: str, limit: int = 2, fits: int | None = None, draining: bool = False
    ) -> list[str]:
        fits = limit if fits is None else fits
        return self.placement.report(Report(name, f"http://{name}", limit, fits, list(sessions), draining))

    def begin(self, session: str, resumed: bool = False) -> str:
        with self.placement.placing(session if resumed else None) as replica:
            self.placement.opened(session, replica)
        return replica.name

    def owner(self, session: str) -> str | None:
        replica = self.placement.owner(session)
        return replica and replica.name


def assert_full(cluster: Cluster, resumed: str | None = None) -> None:
    with pytest.raises(RefusedError) as error, cluster.placement.placing(resumed):
        pass
    assert error.value.code == "limit_sessions"
    assert error.value.status == 503


def test_sessions_go_where_most_is_free_until_all_is_full() -> None:
    cluster = Cluster()
    assert_full(cluster)
    cluster.report("a", limit=2)
    cluster.report("b", limit=4)
    assert cluster.placement.capacity == cluster.placement.free == 6
    assert [cluster.begin(f"s{k}") for k in range(6)] == ["b", "a", "b", "b", "a", "b"]
    assert cluster.placement.free == 0
    assert_full(cluster)
    assert cluster.owner("s4") == "a"
    cluster.placement.closed("s4")
    assert cluster.owner("s4") is None
    assert cluster.begin("s6") == "a"


def test_a_place_is_taken_while_a_session_begins_and_given_back_if_it_does_not() -> None:
    cluster = Cluster()
    cluster.report("a", limit=1)
    with cluster.placement.placing() as replica:
        assert replica.name == "a"
        assert_full(cluster)
    assert cluster.placement.free == 1
    with pytest.raises(RefusedError), cluster.placement.placing(None, [replica]):
        pass  # it has refused already


def test_reports_decide_but_for_what_is_newer_than_they() -> None:
    cluster = Cluster()
    cluster.report("a")
    cluster.begin("one")
    cluster.report("a")  # was on its way
    assert cluster.owner("one") == "a"
    cluster.now += SETTLED + 0.1
    cluster.report("a", "two")  # one has ended
    assert cluster.owner("one") is None
    assert cluster.owner("two") == "a"
    fresh = Cluster()  # another front knows as much after a report
    fresh.report("a", "two")
    assert fresh.owner("two") == "a"
    assert fresh.placement.free == 1


def test_a_replica_that_does_not_keep_up_takes_no_new_session_but_those_that_had_a_place() -> None:
    cluster = Cluster()
    cluster.report("a", "one", limit=3, fits=1)
    assert cluster.placement.free == 0
    assert_full(cluster)
    cluster.report("b", "two")
    cluster.placement.lose(cluster.placement.replicas["b"])
    assert cluster.begin("two", resumed=True) == "a"
    generous = Cluster(overcommit=True)
    generous.report("a", "one", limit=3, fits=1)
    assert generous.placement.free == 2
    assert generous.begin("two") == "a"


def test_a_silent_replica_is_lost_and_its_sessions_keep_places() -> None:
    cluster = Cluster()
    cluster.report("a", "one")
    cluster.report("b", "two", "three")
    for _ in range(LOST):
        cluster.now += 1000  # the front stood still
        cluster.report("a", "one")
        cluster.placement.sweep()
    assert not cluster.lost
    cluster.placement.sweep()
    assert cluster.lost == ["b"]
    assert cluster.owner("two") is None
    assert cluster.placement.free == 0  # the place that is free is kept
    assert_full(cluster)
    assert cluster.begin("three", resumed=True) == "a"
    assert_full(cluster, resumed="two")  # no networks are left for it
    cluster.report("c")  # Ray has started another replica
    assert cluster.placement.free == 1
    assert cluster.begin("two", resumed=True) == "c"
    assert cluster.begin("new") == "c"
    assert cluster.placement.free == 0


def test_places_are_kept_for_a_while() -> None:
    cluster = Cluster()
    cluster.report("a")
    cluster.report("b", "one", "two")
    cluster.placement.lose(cluster.placement.replicas["b"])
    cluster.now += RESERVED + 0.1
    cluster.report("a")
    assert cluster.placement.free == 2


def test_a_replica_that_comes_back_ends_what_goes_on_elsewhere() -> None:
    cluster = Cluster()
    cluster.report("a", "one", "two")
    cluster.report("b")
    cluster.placement.lose(cluster.placement.replicas["a"])
    assert cluster.begin("one", resumed=True) == "b"
    assert cluster.report("a", "one", "two") == ["one"]
    assert cluster.owner("one") == "b"
    assert cluster.owner("two") == "a"


def test_a_session_that_has_moved_is_where_it_went_last() -> None:
    cluster = Cluster()
    cluster.report("a", "one", draining=True)
    cluster.report("b")
    assert cluster.begin("one", resumed=True) == "b"
    assert cluster.owner("one") == "b"
    cluster.placement.closed("one", cluster.placement.replicas["a"])  # its last viewer there was slow
    assert cluster.owner("one") == "b"
    cluster.placement.closed("one", cluster.placement.replicas["b"])
    assert cluster.owner("one") is None


def test_a_draining_replica_keeps_its_sessions_and_takes_none() -> None:
    cluster = Cluster()
    cluster.report("a", "one", draining=True)
    assert cluster.owner("one") == "a"
    assert cluster.placement.free == cluster.placement.capacity == 0
    assert_full(cluster)
    assert_full(cluster, resumed="one")


def test_room_is_never_negative() -> None:
    assert Replica("a", "http://a", 2, 1, begun={"one": 0.0, "two": 0.0}).room(measured=True) == 0


@pytest.mark.parametrize(
    ("chunks", "fits"),
    [
        ([], 1),  # nothing is known
        ([None], 1),
        ([1.0], 1),  # two would take 2 s for 1.12 s
        ([0.5], 2),
        ([0.5, None], 2),
        ([0.5, 0.56], 4),
        ([0.1], 8),  # as many as there are networks
        ([2.0, 2.0], 2),  # they are there
    ],
)
def test_as_many_sessions_fit_as_their_chunks_leave_time_for(chunks: list[float | None], fits: int) -> None:
    assert fitting(8, chunks, 1.12) == fits


@pytest.mark.parametrize(
    ("sessions", "places", "replicas", "number"),
    [(0, 2, 1, 1), (1, 1, 1, 2), (2, 4, 2, 2), (3, 4, 2, 2), (4, 4, 2, 3), (1, 8, 4, 1), (0, 0, 0, 0), (5, 0, 2, 2)],
)
def test_one_place_is_wanted_beside_those_that_are_taken(
    sessions: int, places: int, replicas: int, number: int
) -> None:
    assert wanted(sessions, places, replicas) == number
