"""The audit of one kernel at its production shape, which takes seconds."""

import pytest

from profiling.results import AuditResult
from tests.profiling.attention_kernel import attention
from tests.profiling.audit.audited import audited


@pytest.fixture(scope="package")
def production() -> AuditResult:
    """The attention kernel as it would run in the 14B student."""
    (result,) = audited(attention)
    return result
