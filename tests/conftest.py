"""Shared settings: one thread unless a test says otherwise, no network, reproducible runs."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HIPSERVE_MEASURE"] = "0"  # the same crossovers and kernels on every machine

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "hipserve",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("hipserve")


# Torch, transformers and vLLM hold some 600,000 objects, which every full collection would visit.
gc.set_threshold(100_000, 20, 50)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
