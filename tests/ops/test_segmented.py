"""Updates of runs of tokens: each way that runs here, against the formula in float64."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapterlab.engine.products import fastest
from adapterlab.errors import BuildError
from adapterlab.foreign import compiler
from adapterlab.ops import by_address
from adapterlab.ops.by_address import ByAddress
from adapterlab.ops.segmented import FUNCTIONS, TYPES, Run, Runs, Update, by_column, entry, in_one_block, product
from segmented_runs import DTYPES, check, drawn

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler"
)


@pytest.fixture(scope="module")
def way() -> Any:
    return ByAddress()


@needs_compiler
@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", ByAddress.dtypes)
def test_the_compiled_kernel_is_the_formula(dtype: torch.dtype, factors: torch.dtype, way: Any) -> None:
    for seed in range(20):
        check(way, seed, dtype, factors)


@needs_compiler
def test_a_token_gets_the_same_whatever_is_beside_it(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_address, "_ALONE", 0)
    updates, _, x, y = drawn(3, torch.float32, torch.float32)
    update, tokens = updates[0], x.shape[1]
    alone = y.clone()
    for t in range(tokens):
        product(way, [update], Runs([Run(0, 1, 0)], 1))(x[:, t], alone[:, t])
    product(way, [update], Runs([Run(0, tokens, 0)], tokens))(x, y)
    assert torch.equal(y, alone)


@needs_compiler
def test_bfloat16_is_rounded_as_torch_does(way: Any) -> None:
    """Ties go to even numbers, and what is not finite stays so."""
    added = torch.tensor(
        [2.0**-8, 2.0**-8, -(2.0**-9), 2.0**-9 + 2.0**-16, 0.0, torch.inf, -torch.inf, torch.nan, 1e38]
    )
    y = torch.tensor([1.0, 1 + 2.0**-7, 1.0, 1.0, torch.nan, 1.0, torch.inf, 1.0, 3.39e38]).bfloat16()
    wanted = (y.float() + added).bfloat16()
    product(way, [Update(torch.ones(1, 1), added[:, None])], Runs([Run(0, 1, 0)], 1))(
        torch.ones(1, 1).bfloat16(), y[None]
    )
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_factors_are_read_where_they_are_and_stay_with_their_run(way: Any) -> None:
    a, b, x, y = (torch.randn(shape) for shape in ((4, 8), (6, 4), (3, 8), (3, 6)))
    call = product(
        way, [Update(a, by_column(b)), Update(a.clone(), by_column(b))], Runs([Run(0, 1, 0), Run(1, 2, 1)], 3)
    )
    a.zero_()
    found = y.clone()
    call(x, found)
    assert torch.equal(found[[0, 2]], y[[0, 2]])
    assert not torch.equal(found[1], y[1])
    a.fill_(torch.nan)
    call(x, found)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
    call(torch.randn(8, 3).T, found)  # x may lie in any order
    with pytest.raises(ValueError, match="3 tokens of 8 numbers"):
        call(x[:2], found)
    with pytest.raises(ValueError, match="one behind"):
        call(x, torch.zeros(6, 3).T)
    with pytest.raises(ValueError, match="received"):
        call(x.double(), y.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", TYPES)
def test_a_copy_in_one_block_is_no_wider_than_the_tokens(dtype: torch.dtype, factors: torch.dtype) -> None:
    torch.manual_seed(0)
    draw = torch.randn(3, 10).to(factors), torch.randn(7, 3).to(factors), torch.randn(3).to(factors)
    kept = dtype if factors is torch.float32 else factors
    for d, f in ((None, None), (draw[2], "silu")):
        a, b, *rest = made = in_one_block(Update(*draw[:2], 0.5, d, f), dtype)
        assert (a.dtype, b.dtype, rest[0], rest[2]) == (kept, kept, 0.5, f)
        assert all(
            one is other is None or torch.equal(one, other.to(kept))
            for one, other in zip((a, b, rest[1]), (*draw[:2], d), strict=True)
        )
        at_d = a.data_ptr() + a.nbytes + b.nbytes if d is not None else 0
        shown = (a.data_ptr(), a.data_ptr() + a.nbytes, at_d, 3, 0.5, TYPES[kept], FUNCTIONS.index(f), 0)
        assert entry(made, 10, 7) == shown
        assert a.data_ptr() != draw[0].data_ptr()


def test_what_no_kernel_can_read_is_refused() -> None:
    a, b, runs = torch.zeros(4, 8), by_column(torch.zeros(6, 4)), Runs([Run(0, 1, 0)], 1)
    for more in ((torch.zeros(3),), (torch.zeros(4).half(),), (None, "sine"), (torch.zeros(8)[::2],)):
        with pytest.raises(ValueError, match="laid out"):
            product(None, [Update(a, b, 1.0, *more)], runs)  # type: ignore[arg-type]
    wrong = [(a.T.contiguous().T, b), (a.double(), b.double()), (a, b.half()), (a[:3], b), (a.flatten(), b)]
    for one, other in [*wrong, (a, b.contiguous()), (torch.zeros(2000, 8), by_column(torch.zeros(6, 2000)))]:
        with pytest.raises((ValueError, IndexError)):
            product(None, [Update(a, b), Update(one, other)], runs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not within 3 tokens"):
        Runs([Run(2, 4, 0)], 3)


@needs_compiler
def test_a_kernel_that_computes_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "_ALWAYS", ("-O0", "-std=gnu11", "-fPIC"))
    text = by_address.SOURCE.read_text()
    for line, wrong in {
        "h[t][i] = u->scale * (": "h[t][i] = (",
        "tanhf(z)": "z",
        "1 + erff": "1.01f + erff",
        "0.044715f": "0.05f",
        "(1 + expf(-z))": "(1 + expf(z))",
        "load_some(u->d, i, 1, type)[0]": "0",
    }.items():
        assert line in text
        (tmp_path / "wrong.c").write_text(text.replace(line, wrong))
        with pytest.raises(BuildError, match="something else here: off by"):
            ByAddress(tmp_path / "wrong.c")


# ---------------------------------------------------------------------- the compiler


@needs_compiler
def test_a_library_is_compiled_once_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path))
    source = tmp_path / "seven.c"
    source.write_text("int seven(void) { return 7; }")
    assert compiler.library(source).seven() == 7
    native = tmp_path / "native"
    (kept,) = native.iterdir()
    assert (native.stat().st_mode & 0o777, kept.stat().st_mode & 0o777) == (0o700, 0o500)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_compile", lambda *_: pytest.fail("it is there"))
        assert compiler.library(source).seven() == 7
    source.write_text("int seven(void) { return 8; }")
    assert compiler.library(source).seven() == 8
    assert len(list(native.iterdir())) == 2
    source.write_text("int seven(void) { return nine; }")
    with pytest.raises(BuildError, match=r"failed: .*nine"):
        compiler.library(source)
    assert len(list(native.iterdir())) == 2


@needs_compiler
def test_what_others_can_write_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, source = tmp_path / "home", tmp_path / "seven.c"
    monkeypatch.setenv("ADAPTERLAB_HOME", str(home))
    source.write_text("int seven(void) { return 7; }")
    compiler.library(source)
    (kept,) = (home / "native").iterdir()
    for place, mode, good, why in (
        (kept, 0o722, 0o500, "not written by this user alone"),
        (home / "native", 0o755, 0o700, "must belong to this user alone"),
        (home, 0o777, 0o755, "everybody may write"),
    ):
        place.chmod(mode)
        with pytest.raises(BuildError, match=why):
            compiler.library(source)
        place.chmod(good)
    compiler.library(source)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C compiler"):
        compiler.library(source)


LINKER = """#!/bin/sh
case "$*" in
  *--version*) echo 1 ;;
  *) echo "ld: final link failed: No space left on device
collect2: error: ld returned 1 exit status" >&2; exit 1 ;;
esac
"""


@needs_compiler
@pytest.mark.parametrize("moment", ["home", "work", "compiler", "place"])
def test_where_the_disk_is_full_there_is_no_kernel_and_a_reason(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("ADAPTERLAB_HOME", str(tmp_path / "home"))
    if moment == "compiler":
        (tmp_path / "cc").write_text(LINKER)
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    elif moment == "work":
        monkeypatch.setattr(compiler, "tempfile", SimpleNamespace(TemporaryDirectory=full))
    else:
        monkeypatch.setattr(compiler.Path, "mkdir" if moment == "home" else "replace", full)
    way, why = fastest.__wrapped__("cpu")
    monkeypatch.undo()
    assert way is None
    assert "No space left on device" in why
    native = tmp_path / "home" / "native"
    assert not native.exists() or not list(native.iterdir()), "nothing is left behind"


# ---------------------------------------------------------------------- Triton


def test_tritons_kernels_are_the_formula_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    program = "from segmented_runs import with_triton; with_triton('cpu')"
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
