"""`python -m streaming cluster` and the examples: mistakes end in one line, and configuration files are understood."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.errors import UserError
from streaming.cluster.scaling import by_sessions
from tests.streaming import command

EXAMPLES = Path(__file__).parents[3] / "examples" / "cluster"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), "Missing option '--snapshots'"),
        (("--snapshots", "{}", "--replicas", "3", "--max-replicas", "2"), "--max-replicas 2 is less than --replicas 3"),
        (("--snapshots", "/proc/no"), "--snapshots /proc/no cannot be made"),
        (("--snapshots", "{}", "--host", "0.0.0.0"), "set $FLASHTALK_TOKEN"),
        (
            ("--snapshots", "{}", "--ray", "auto"),
            "--ray auto: replicas on other machines cannot reach",
        ),
        (("--snapshots", "{}", "--preset", "huge"), "preset huge"),
    ],
)
def test_a_mistake_ends_in_one_line(
    options: tuple[str, ...],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("FLASHTALK_TOKEN", raising=False)
    arguments = [option.format(tmp_path) for option in options]
    assert command.call(monkeypatch, "cluster", "--quiet", *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert problem in line


def context(**metrics: dict[str, float]) -> Any:
    return SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=3)


def test_ray_serve_is_told_how_many_replicas_sessions_need() -> None:
    assert by_sessions(context()) == (3, {})  # nothing was reported yet
    assert by_sessions(context(sessions={"a": 2.0, "b": 2.0}, places={"a": 2.0, "b": 2.0}))[0] == 3
    assert by_sessions(context(sessions={"a": 0.0, "b": 1.0}, places={"a": 2.0, "b": 2.0}))[0] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray
def test_the_rayservice_is_what_the_application_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is missing: pip install 'flashtalk-triton[cluster]'")
    yaml = pytest.importorskip("yaml", reason="yaml comes with ray")
    from streaming.cluster.deployment import build

    monkeypatch.setenv("FLASHTALK_TOKEN", "the-token-of-a-test")
    parts = list(yaml.safe_load_all((EXAMPLES / "rayservice.yml").read_text()))
    assert [part["kind"] for part in parts] == ["PersistentVolumeClaim", "Deployment", "Service", "RayService"]
    (application,) = yaml.safe_load(parts[-1]["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    arguments = application["args"] | {"snapshots": str(tmp_path / "sessions")}
    replica = build(arguments)._bound_deployment
    assert replica.ray_actor_options == {"num_gpus": 1, "num_cpus": 4}
    scaling = replica._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 8)
    port = parts[2]["spec"]["ports"][0]["port"]
    assert arguments["front"] == f"http://{parts[2]['metadata']['name']}:{port}"
    for wrong in ({"replica": 2}, {"front": None}):
        with pytest.raises(UserError, match=f"args: {next(iter(wrong))} is unknown or missing"):
            build(arguments | wrong)


def test_the_compose_file_has_options_of_the_command() -> None:
    yaml = pytest.importorskip("yaml", reason="yaml comes with ray")
    services = yaml.safe_load((EXAMPLES / "compose.yml").read_text())["services"]
    script = services["head"]["command"][-1]
    assert "python -m streaming cluster" in script
    declared = (Path(__file__).parents[3] / "streaming" / "__main__.py").read_text()
    body = declared[declared.index("def cluster(") : declared.index('"""Serves live sessions by many')]
    for option in re.findall(r"--([a-z-]+)", script.partition("streaming cluster")[2]):
        assert f" {option.replace('-', '_')}:" in body, option
