"""Every launch of the table's layers, compiled for every chip it ships for."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import cycle
from multiprocessing import get_context

import pytest
import torch

from secura.cli import main
from secura_kernels import NormOptions
from secura_kernels.dispatch import interpreting
from secura_kernels.gpu import Limits, assume, assumed, limits_of
from secura_kernels.inspection.kernel_table import COLUMNS, kernel_reports, kernel_table

pytest.importorskip("triton")
from triton import knobs

from secura_kernels.inspection.examples import Case
from secura_kernels.inspection.launches import (
    EVERY,
    FULL,
    ODD,
    PLAIN,
    RECORDED,
    Recorded,
    launches,
    problems,
)
from secura_kernels.inspection.recorder import (
    TARGETS,
    Report,
    Rule,
    _active_driver,
    record,
)
from secura_kernels.plan import splits

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are interpreted, not compiled")

SM_90 = TARGETS["sm_90"]
ONE = "activation_fwd: activation bfloat16 t=1"


@pytest.fixture(scope="module")
def compiler():
    """A process that compiles and does nothing else, as ``secura doctor`` does.

    In one that had run other tests before a case was once compiled to other code.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def compiled():
    """``(case, chip)``: plain, full and odd layers and merges for each chip, others for two.

    Those in rotation; ``secura doctor --kernels`` compiles all of them for its chip.
    """
    turns = cycle(range(0, len(EVERY), 2))
    for case in RECORDED:
        of, norm = case.case, NormOptions(case.case.options.norm)
        whole = [replace(PLAIN, options=norm, **flags) for flags in ({}, FULL, FULL | ODD)]
        if case.targets != EVERY or case.merge or (of in whole and not case.columns):
            chips = case.targets
        else:
            turn = next(turns)
            chips = EVERY[turn : turn + 2]
        yield from ((case, chip) for chip in chips)


COMPILED = list(compiled())


@pytest.mark.parametrize(
    ("case", "target"),
    [pytest.param(case, target, id=f"{case.name}-{target}") for case, target in COMPILED],
)
def test_no_spills_shared_memory_fits_wide_loads_and_matrix_instructions(case, target, compiler):
    found = compiler.submit(problems, case, TARGETS[target]).result()
    assert found
    assert not any(found.values()), {key: wrong for key, wrong in found.items() if wrong}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_chip_compiles_every_kernel(target):
    names = []
    for cases in (RECORDED, [case for case, chip in COMPILED if chip == target.name]):
        with record(target) as found:
            for case in cases:
                case.run()
        names.append({launch.kernel.__name__ for launch in found})
    assert names[0] == names[1]


def test_names_are_unique():
    names = [name for name, _, _ in launches(SM_90)]
    assert len(names) > 100
    assert len({case.name for case in RECORDED}) == len(RECORDED)


def test_every_kernel_is_in_the_table():
    kernels = {launch.kernel.__name__ for _, launch, _ in launches(SM_90)}
    assert kernels == {
        "_gather_kernel", "_add_product_kernel", "_output_gradient_kernel", "_add_columns_kernel",
        "_channel_kernel", "_project_fwd_kernel", "_project_bwd_kernel",
        "activation_fwd_kernel", "activation_bwd_kernel", "weight_fwd_kernel",
        "weight_bwd_kernel", "weight_stat_kernel", "_gain_scalars_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("norm", ["none", "channel", "activation", "weight"])
def test_other_numbers_of_tokens_start_the_same_code(norm, given):
    """A batch of another length must not wait for a compiler."""
    if given and norm == "weight":
        pytest.skip("the space takes no y0")
    keys = []
    for t in (8192, 8191, 8184):
        with record(SM_90) as found:
            full = FULL if given else {}
            case = replace(PLAIN, options=NormOptions(norm), t=t, given=given, **full)
            Recorded(case).run()
        keys.append({launch.key for launch in found})
    assert keys[0] == keys[1] == keys[2]


def test_programs_share_columns_until_each_multiprocessor_has_two():
    h100 = 132
    assert [splits(programs, 64, h100) for programs in (1, 32, 128, 132, 133, 1000)] == [
        8, 8, 2, 2, 1, 1
    ]  # fmt: skip
    assert splits(1, 3, h100) == 3


def test_recording_leaves_nothing_behind():
    layer = Case(NormOptions("none"), m=2, t=4, n=4, k=64, trains_bias=False).draw("meta")
    before = _active_driver()
    with record(SM_90) as found:
        layer.output("triton")
        assert assumed() == SM_90.limits and _active_driver() is not before
    assert [launch.kernel.__name__ for launch in found] == [
        "_project_fwd_kernel", "_gather_kernel", "_add_product_kernel"
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError), record(SM_90):
        raise ZeroDivisionError
    assert assumed() is None and _active_driver() is before
    assert knobs.runtime.jit_cache_hook is None
    with pytest.raises(RuntimeError, match="the tensor is on meta"):
        layer.output("triton")


def test_an_assumed_machine_is_that_of_tensors_elsewhere():
    limits = Limits(64 * 1024, 304, rocm=True)
    with assume(limits):
        assert limits_of(torch.empty(1)) is limits
    assert limits_of(torch.empty(1)).processors == 132


def test_problems_name_what_is_wrong():
    report = Report("gfx942", 256, 4, 65537, 0, 0, 10**6, 0)
    text = "; ".join(report.problems(Rule(1, 0, 0, True)))
    for part in ("spills 4", "65537 bytes shared", "0 16-byte loads", "one or two bytes", "no mat"):
        assert part in text
    cuda = report._replace(target="sm_90").problems(Rule(wide_stores=1))
    assert cuda == ["spills 4 bytes", "0 16-byte stores"]


def test_table_prints_a_row_a_report():
    rows = list(kernel_table(kernel_reports(["sm_90"], match=ONE)))
    assert rows[0] == "| " + " | ".join(COLUMNS) + " |"
    assert rows[2].startswith(f"| {ONE} | sm_90 |") and rows[2].endswith("| ok |")


def test_table_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="sm_1"):
        next(kernel_reports(["sm_1"]))
    monkeypatch.setattr(
        "secura_kernels.inspection.kernel_table.triton_missing", lambda: "triton is not installed"
    )
    with pytest.raises(RuntimeError, match="triton is not installed"):
        next(kernel_reports())


def test_compiling_under_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreted"), record(SM_90):
        pass


def test_doctor_kernels_prints_the_table_and_fails_on_a_problem(monkeypatch, capsys):
    case = next(case for case in RECORDED if ONE.endswith(f": {case.name}"))
    monkeypatch.setattr("secura_kernels.inspection.launches.RECORDED", (case,))
    assert main(["doctor", "--kernels", "sm_90"]) == 0
    assert f"| {ONE} | sm_90 |" in capsys.readouterr().out
    monkeypatch.setattr(Report, "problems", lambda report, rule: ["spills 8 bytes"])
    assert main(["doctor", "--kernels", "sm_90"]) == 1
    assert "spills 8 bytes" in capsys.readouterr().out
    assert main(["doctor", "--kernels", "sm_1", "--kernels", "sm_90"]) == 2
    assert "unknown target" in capsys.readouterr().err
