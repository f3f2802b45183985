"""Teacher and student train, one after another, and what they write is loaded again."""

import pytest

from model.distill import student, teacher
from model.distill.student_network import load_network
from model.distill.takes import make_takes
from model.distill.training import Budget
from model.errors import UserError
from tests.model.distill.conditions import needs_espeak, quiet
from tests.model.distill.test_teacher import SMALL


@needs_espeak
def test_every_stage_trains_and_is_loaded_again(tmp_path):
    make_takes(tmp_path / "takes", 1, report=quiet)
    make_takes(tmp_path / "takes", 2, held_out=True, report=quiet)
    more = {"takes": tmp_path / "takes", "report": quiet}
    teacher.train(tmp_path / "lips", Budget(steps=1), stage="windows", config=SMALL, **more)
    weights = tmp_path / "lips" / teacher.WEIGHTS
    counters = teacher.train(
        tmp_path / "teacher", Budget(steps=1), stage="streaming", config=SMALL, start=weights, **more
    )
    assert {"r open", "gain at 0.97", "mouth psnr"} <= counters.history[-1].keys()
    counters = student.train(
        tmp_path / "student", Budget(steps=1), teacher=tmp_path / "teacher" / teacher.WEIGHTS, **more
    )
    assert {"loss at 1", "loss at 0.4", "r open"} <= counters.history[-1].keys()
    found = load_network(tmp_path / "student" / student.WEIGHTS)
    assert found.config == SMALL
    (tmp_path / "damaged").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a trained network"):
        load_network(tmp_path / "damaged")
