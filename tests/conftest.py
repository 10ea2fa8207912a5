"""Shared test set-up: CPU with four simulated devices, the --heavy flag, where the data lies."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
if "--heavy" not in sys.argv:  # most tests compile more than they compute
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # the next one has no such flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Many tests compile the same small programs, some in processes of their own in other folders.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache/compiled")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

# Real texts, used where they are found; the project holds none of them.
DATA = Path(os.environ.get("ALIGN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--heavy", action="store_true", help="also run the tests marked heavy")


# Files of few and long tests: begun first, so that no worker is left with one at the end.
FIRST = ("test_processes.py", "test_trl.py", "test_dpo.py", "test_generate.py", "test_pairrm.py")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in FIRST)
    if not config.getoption("--heavy"):
        for item in items:
            if "heavy" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="heavy: run with --heavy"))


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """`--dtype auto` is float32 in this process, whatever the CPU has: numbers are compared. Tests
    that start processes give them `--dtype float32`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.precision.cpu_multiplies_bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no real texts at {DATA}: set ALIGN_TEST_DATA")
    return DATA
