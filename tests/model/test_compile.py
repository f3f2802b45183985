"""What is compiled, when, and where it is cached. tests/streaming checks that chunks then compile nothing."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import model.compile
import model.warm
from model.compile import compile_student, load_compiled, stand_in_models, use_compile_cache, warm_up
from model.config import PRECISIONS, TINY_RANDOM
from model.dit import DiT
from model.errors import UserError
from model.machine import CACHE_ENV, cache_key
from model.rope import rope_table
from model.warm import main, pack, unpack
from tests.small import SMALL, write_checkpoint

CPU = torch.device("cpu")
# Two latents per chunk, one of them known: as few shapes as there can be, and each takes seconds to compile.
SHORT = replace(SMALL, chunk=replace(SMALL.chunk, frame_num=5, motion_frames_num=1))
ONE_LAYER = replace(SHORT, dit=replace(SHORT.dit, num_layers=1), vae=TINY_RANDOM.vae)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The graphs given to a compiler that runs them unchanged."""
    given: list[object] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        given.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=keep))
    torch.compiler.reset()
    return given


@torch.inference_mode()
def test_each_number_of_speakers_is_compiled_once(compilations: list[object]) -> None:
    """A block and the last block, for one speaker and for two, however often the number changes."""
    torch.manual_seed(0)
    dit = DiT(SMALL.dit)
    compile_student(dit)
    frames, rows, columns = 3, 4, 6
    latent, condition = torch.randn(frames, 16, rows, columns), torch.randn(frames, 20, rows, columns)
    context = dit.embed_context(
        torch.randn(4, SMALL.dit.text_dim), torch.randn(SMALL.dit.img_tokens, SMALL.dit.img_dim)
    )
    rope = rope_table((frames, rows // 2, columns // 2), SMALL.dit.head_dim)
    regions = torch.tensor([0, 0, 1, 1, 2, 2])
    masks = torch.stack([(regions == person).float() for person in range(3)])
    window = SMALL.dit.audio_window, SMALL.dit.audio_blocks, SMALL.dit.audio_channels

    def velocity(speakers: int) -> Tensor:
        audio = dit.embed_audio(torch.randn(speakers, 9, *window))
        return dit(latent, condition, dit.modulate(500.0), rope, context, audio, masks if speakers == 2 else None, 1)

    for counts, expected in (((1, 1), 2), ((2, 2), 4), ((1, 2, 1, 2, 1), 4)):
        for speakers in counts:
            assert velocity(speakers).isfinite().all()
        assert len(compilations) == expected


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (CACHE_ENV, "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_a_stand_in_compiles_everything_while_a_checkpoint_loads(
    tmp_path: Path, compilations: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.compile, "FAIL_FAST_SECONDS", 0)
    folder = write_checkpoint(tmp_path / "checkpoint")
    models = load_compiled(SHORT, folder, CPU, PRECISIONS["fp32"])
    assert models.folder == folder
    seen = len(compilations)
    assert seen
    warm_up(models)
    assert len(compilations) == seen


@pytest.mark.usefixtures("cache", "compilations")
def test_errors_of_a_checkpoint_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a checkpoint: there is no such folder$"):
        load_compiled(SMALL, tmp_path / "nothing", CPU, PRECISIONS["fp32"])


def test_a_second_process_finds_the_compiled_code(cache: Path) -> None:
    """Inductor code of a student's block; resetting torch.compile stands for a new process."""
    models = stand_in_models(ONE_LAYER, CPU, PRECISIONS["fp32"])
    assert str(cache) in str(use_compile_cache(CPU))
    found = []
    for _ in range(2):
        torch.compiler.reset()
        compile_student(models.dit)
        before = counters["inductor"]["fxgraph_cache_hit"]
        warm_up(models)
        found.append(counters["inductor"]["fxgraph_cache_hit"] - before)
    assert found == [0, 1]
    assert any((cache / cache_key(CPU) / "inductor").iterdir())


def test_pack_and_unpack(tmp_path: Path) -> None:
    folder, other, file = tmp_path / "a", tmp_path / "b", tmp_path / "packed" / "a.zip"
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "kernel.cubin").write_bytes(b"code")
    pack(folder, "h100", file)
    unpack(file, other, "h100")
    assert (other / "triton" / "kernel.cubin").read_bytes() == b"code"
    with pytest.raises(UserError, match=r"it was made on h100, but this machine is h200$"):
        unpack(file, tmp_path / "c", "h200")
    assert not (tmp_path / "c").exists()


def test_a_file_that_is_no_packed_cache_is_reported_in_one_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("x")
    zipfile.ZipFile(tmp_path / "empty", "w").close()
    for name in ("text", "empty", "missing"):
        monkeypatch.setattr("sys.argv", ["warm", "--device", "cpu", "--unpack", str(tmp_path / name)])
        assert main() == 2
        assert capsys.readouterr().err.startswith(f"error: --unpack {tmp_path / name} cannot be read")
    for option, value in (("--preset", "huge"), ("--precision", "int4"), ("--device", "tpu")):
        monkeypatch.setattr("sys.argv", ["warm", option, value])
        assert main() == 2
        assert capsys.readouterr().err.startswith(f"error: {option} {value}: there is no such choice")
    assert not cache.exists()


@pytest.mark.usefixtures("compilations")
def test_the_command_reports_directory_and_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "packed.zip"
    monkeypatch.setitem(model.warm.PRESETS, "small", ONE_LAYER)
    arguments = ["--preset", "small", "--precision", "fp32", "--pack", str(file), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["warm", *arguments])
    assert main() == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{cache / cache_key(CPU)}: compiled in ")
    assert second.startswith(f"{file}: ")
    assert file.is_file()
