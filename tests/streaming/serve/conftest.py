"""Tests of the server need what it needs; those of the page share a browser."""

from collections.abc import Iterator
from typing import Any

import pytest

for _package in ("aiohttp", "aiortc", "msgspec", "prometheus_client"):
    pytest.importorskip(_package, reason=f"{_package} is missing: pip install 'flashtalk-triton[live]'")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.streaming.serve.browser import running_browser  # which needs the packages above

    with running_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser
