"""libFuzzer on the C interface: structs, strides, index content and lent pools that lie, under ASan and UBSan.

``EDGETOK_FUZZ_SECONDS`` is the time for all targets together (a few seconds by default, a minute in CI). A finding is
printed with the bytes that lead to it; put them into a file and run the target on it to see it again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import c_build
import pytest

FUZZ = c_build.ROOT / "kernels_c" / "fuzz"
TARGETS = sorted(path.stem for path in FUZZ.glob("fuzz_*.c"))
SECONDS = max(1, round(float(os.environ.get("EDGETOK_FUZZ_SECONDS", "6")) / len(TARGETS)))
CORPUS_FILES, CORPUS_BYTES = 40, 1024
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("no clang here")
    (folder / "probe.c").write_text(
        "#include <stddef.h>\n#include <stdint.h>\n"
        "int LLVMFuzzerTestOneInput(const uint8_t *d, size_t n) { (void)d; return n > 1u << 30; }\n"
    )
    flags = ["-fsanitize=fuzzer,address,undefined", folder / "probe.c", "-o", folder / "probe"]
    if subprocess.run([clang, *flags], capture_output=True).returncode:
        pytest.skip("this clang has no libFuzzer (Debian: libclang-rt-dev)")
    return c_build.build(folder / "build", f"-DCMAKE_C_COMPILER={clang}", "-DEDGETOK_FUZZ=ON", targets=tuple(TARGETS))


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_calls_are_answered_with_a_status(programs: Path, tmp_path: Path, target: str) -> None:
    found = tmp_path / "found"
    found.mkdir()
    c_build.run(
        programs / "kernels_c" / target,
        f"-seed={os.environ.get('EDGETOK_FUZZ_SEED', '1')}",  # one sequence, so that a finding belongs to a change
        f"-max_total_time={SECONDS}",
        "-timeout=60",
        "-rss_limit_mb=2048",
        "-max_len=600",
        "-len_control=0",
        "-print_final_stats=1",
        f"-artifact_prefix={tmp_path}/",
        found,
        FUZZ / "corpus" / target,
        timeout=SECONDS + 600,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_corpus_is_there_and_small(target: str) -> None:
    files = list((FUZZ / "corpus" / target).iterdir())
    assert 1 <= len(files) <= CORPUS_FILES
    assert all(file.stat().st_size <= CORPUS_BYTES for file in files)
