"""Several ranks generate the video of one, agree beforehand, and end in one line when one of them is lost."""

import functools
import signal
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from torch import Tensor

from model.parallel.ranks import ulysses_degree
from streaming.ranks import EXIT_LOST, LOST_AFTER, RankLostError, SignsOfLife, environments, noticing_losses
from tests.model.parallel.jobs import CONFIGS
from tests.processes import Interpreter, Process
from tests.ranks import MAX_WORLD, RankPool, rank_pool
from tests.streaming import rank_jobs as jobs
from tests.tensors import error


@pytest.fixture(scope="module")
def pool(python: Interpreter):
    with rank_pool(python) as pool:
        yield pool


# --- The video of one rank ------------------------------------------------------------------------------------------


@functools.cache
def of_one_rank(name: str) -> Tensor:
    """The bytes of two chunks' frames."""
    return jobs.chunks(None, name, 2)[0]


@pytest.mark.parametrize(("name", "world"), [("odd", 2), ("odd", 3), ("odd", 4), ("tiny-random", 3)])
def test_two_chunks(pool: RankPool, name: str, world: int) -> None:
    """The second one goes on from the motion of the first one."""
    whole = of_one_rank(name)
    results = pool.run(world, ulysses_degree(world, CONFIGS[name].dit.num_heads), jobs.chunks, name, 2)
    frames = results[0][0]
    assert (frames.int() - whole.int()).abs().max() <= 1
    assert (frames != whole).float().mean() < 1e-3  # roundings of a few of all bytes
    height = CONFIGS[name].chunk.height
    for rgb, shapes in results[1:]:
        assert rgb.numel() == 0
        assert all(shape[2] < height for shape in shapes)
    assert sum(shapes[0][2] for _, shapes in results) == height  # together they are the video, and no rank has it all


def test_a_chunk_that_is_given_up_is_given_up_by_all(pool: RankPool) -> None:
    degree = ulysses_degree(MAX_WORLD, CONFIGS["odd"].dit.num_heads)
    motion, frames = pool.run(MAX_WORLD, degree, jobs.led, "odd")[0]
    assert (frames.int() - of_one_rank("odd").int()).abs().max() <= 1
    alone = jobs.new_generator(None, "odd")
    assert error(motion, alone.motion_of(jobs.still("odd"))) < 1e-5


# --- Agreement ------------------------------------------------------------------------------------------------------


def test_ranks_that_differ_hear_which_one_does(pool: RankPool) -> None:
    facts = [{"size": 128, "seed": 1}, {"size": 128}, {"size": 128, "seed": 2}, {}]
    expected = "rank 2 has seed 2, rank 0 has 1; start all with the same"
    assert pool.run(MAX_WORLD, MAX_WORLD, jobs.refused, facts) == [expected] * MAX_WORLD
    assert pool.run(MAX_WORLD, MAX_WORLD, jobs.refused, [{"size": 1}] * MAX_WORLD) == [""] * MAX_WORLD


def test_a_mistake_on_one_rank_ends_all(pool: RankPool) -> None:
    own, others = "there is no such file", "rank 2: there is no such file"
    assert pool.run(MAX_WORLD, MAX_WORLD, jobs.failed, 2) == [others, others, own, others]
    assert pool.run(MAX_WORLD, MAX_WORLD, jobs.failed, -1) == [own] * MAX_WORLD


# --- Losses ---------------------------------------------------------------------------------------------------------


class FakeStore(dict[str, str]):
    broken = False

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        if self.broken:
            raise RuntimeError("Connection reset")
        return [self[key].encode() for key in keys]


def test_a_rank_is_lost_when_its_signs_stop() -> None:
    store = FakeStore()
    lives = [SignsOfLife(store, rank, 3) for rank in range(3)]

    def live_on(signs: int) -> list[int]:
        for _ in range(signs):
            lives[0].give()
            lives[1].give()
        return lives[0].lost()

    for life in lives:
        life.give()
    assert lives[0].lost() == []
    assert live_on(LOST_AFTER) == []
    assert live_on(1) == [2]
    lives[2].stop()
    assert lives[0].lost() == []  # it has ended, and nobody waits for it
    assert live_on(2 * LOST_AFTER) == []


def test_all_are_lost_with_the_store() -> None:
    told, store = [], FakeStore()
    store.broken = True
    life = SignsOfLife(store, 1, 3)
    assert life.lost() == [0, 2]
    life.watch(told.append)
    assert told == [[0, 2]]


def test_only_losses_are_told_as_such() -> None:
    with pytest.raises(RankLostError, match="another rank has ended"), noticing_losses():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), noticing_losses():
        raise RuntimeError("shapes differ")


# --- The command ----------------------------------------------------------------------------------------------------


def start(python: Interpreter, world: int, out: str, sound: Path, *options: tuple[str, ...]) -> list[Process]:
    """The ranks of a run, as torchrun starts them; options[i] are of rank i."""
    command = ["-m", "streaming", "run", "--image", "examples/portraits/amara.jpg", "--audio", sound, "--out", out]
    return [
        python.start(*command, "--size", "64x64", *(options[rank] if options else ()), environment=environment)
        for rank, environment in enumerate(environments(world))
    ]


def sound_of(path: Path, seconds: float) -> Path:
    random = np.random.default_rng(0)
    soundfile.write(path, 0.1 * random.standard_normal(int(16_000 * seconds)), 16_000)
    return path


def frames_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)).astype(int) for file in sorted(folder.rglob("*.png"))]


def test_torchrun_makes_the_video_of_one_process(python: Interpreter, tmp_path: Path) -> None:
    sound = sound_of(tmp_path / "voice.wav", 1.5)
    arguments = ["--image", "examples/portraits/amara.jpg", "--audio", sound, "--size", "64x64", "--steps", "2"]
    run = ["-m", "streaming", "run", *arguments, "--out"]
    python.run(*run, f"{tmp_path}/one/").check_returncode()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    python.run(*launcher, *run, f"{tmp_path}/two/").check_returncode()
    one, two = frames_of(tmp_path / "one"), frames_of(tmp_path / "two")
    assert len(one) == len(two) == 38
    assert all(np.abs(x - y).max() <= 1 for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([("--seed", "1"), ("--seed", "2")], "error: rank 1 has seed 2, rank 0 has 1; start all with the same"),
        ([("--steps", "4"), ("--steps", "2")], "error: rank 1 has steps 2, rank 0 has 4; start all with the same"),
        ([("--noise", "torch")] * 2, "error: noise torch: each GPU would draw its own; use counter"),
    ],
)
def test_what_cannot_be_is_one_line_on_rank_0(
    python: Interpreter, tmp_path: Path, options: list[tuple[str, ...]], line: str
) -> None:
    ranks = start(python, 2, str(tmp_path / "out.mp4"), sound_of(tmp_path / "voice.wav", 1.0), *options)
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said == [line + "\n", ""]
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_others_and_keeps_their_frames(
    python: Interpreter, tmp_path: Path, how: signal.Signals
) -> None:
    ranks = start(
        python, 3, str(tmp_path / "out.mp4"), sound_of(tmp_path / "voice.wav", 300.0), *[("--steps", "1")] * 3
    )
    try:
        shown = iter(ranks[0].stderr.readline, "")
        assert any(line.startswith("chunk 2") for line in shown)
        ranks[1].send_signal(how)
        said = [ranks[0].stderr.read(), ranks[2].communicate()[1]]
        for rank, text in zip((0, 2), said, strict=True):
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, text
            assert errors[0].startswith((f"error: rank {rank}: another rank has ended", f"error: rank {rank}: no sign"))
        assert ranks[0].wait() != 0
        (video,) = tmp_path.glob("*.mp4")
        with av.open(str(video)) as container:
            assert sum(1 for _ in container.decode(video=0)) >= 56
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("noticed", [True, False])
def test_a_loss_is_told_once(python: Interpreter, noticed: bool) -> None:
    """By the thread that has noticed it, or else by the one that looks for signs of life."""
    program = """if True:
        import os, sys
        from streaming import ranks
        ranks.LOST_AFTER = 0
        if sys.argv[1] == "True":
            try:
                with ranks.noticing_losses():
                    raise RuntimeError("Connection closed by peer")
            except ranks.RankLostError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
        ranks._end_process([1])
    """
    done = python.run("-c", program, noticed)
    assert done.returncode == EXIT_LOST
    (line,) = done.stderr.splitlines()
    assert ("another rank has ended" if noticed else "no sign of life from rank 1") in line
