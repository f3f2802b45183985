"""The examples, with a room and a transport of tests in place of a server's."""

import asyncio
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.streaming.agents.stage import FastClock, run
