"""Tests of the front and of replicas need what it needs."""

import pytest

for _package in ("aiohttp", "aiortc", "msgspec", "prometheus_client"):
    pytest.importorskip(_package, reason=f"{_package} is missing: pip install 'flashtalk-triton[live]'")
