"""Tests of the front and of replicas need what it needs; those of the page share a browser."""

from tests.streaming.serve.conftest import browser

__all__ = ["browser"]
