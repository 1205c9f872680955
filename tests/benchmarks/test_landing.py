"""What arrives of small changes in bf16: the benchmarks, their products, tables and picture."""

from __future__ import annotations

import torch

from benchmarks import count_tables, landing, landing_model, plots
from benchmarks.schema import Result


def test_products_are_summed_in_fp32_and_rounded_once():
    source = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randn(size, generator=source).bfloat16() for size in ((9, 40), (40, 7), (9, 7))
    )
    wide = a.float() @ b.float()
    with landing.wide_products():
        x = a.clone().requires_grad_()
        out = x @ b
        out.backward(c)
        found = [out.detach(), torch.nn.functional.linear(a[None], b.t(), c[0])[0]]
        found += [c.clone().addmm_(a, b), torch.bmm(a[None], b[None])[0], x.grad]
    expected = [wide, wide + c[0].float(), wide + c.float(), wide, c.float() @ b.float().t()]
    for got, exact in zip(found, expected, strict=True):
        assert torch.equal(got, exact.bfloat16())
    assert (a @ b).isfinite().all()  # torch's own products are back


def test_shares_are_measured_shown_and_drawn(tmp_path):
    path = tmp_path / "landing-cpu.json"
    assert landing.main(["--device", "cpu", "--preset", "tiny", "--out", str(path)]) == 0
    result = Result.load(path)
    assert result.complete and all(row.status == "ok" for row in result.rows)
    shares = {(row.provider, row.case["change"]): row.figures["share"] for row in result.rows}
    for space in ("none", "channel", "weight"):
        plain, drawn = f"secura {space}", f"secura {space} stochastic"
        assert 0.8 < shares[drawn, 3e-3] < 1.2 and shares[plain, 3e-4] < 0.4
    assert shares["peft lora fp32", 1e-2] > 0.9 and shares["peft lora fp32", 3e-4] < 0.4
    table = count_tables.landing_table(result)
    assert "| 0.01 | 0.003 | 0.001 | 0.0003 | 0.0001 |" in table
    assert "| SECURA none stochastic, m=8 | 1.0" in table
    assert plots.draw_all(tmp_path) == [tmp_path / "landing-cpu-share.svg"]


def test_learning_is_measured_paired_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(landing_model, "SEEDS", 2)
    path = tmp_path / "landing_model-cpu.json"
    flags = ["--device", "cpu", "--preset", "tiny", "--out", str(path), "--resume"]
    assert landing_model.main(flags) == 0
    result = Result.load(path)
    assert result.complete and len(result.rows) == 10
    first = result.rows[0].figures
    assert first["after"] == first["after_fp32"] and first["before"] == first["before_fp32"]
    assert all(row.figures["change"] > 0 for row in result.rows)
    monkeypatch.setattr(landing_model, "learn", None)  # nothing is learned again
    assert landing_model.main(flags) == 0
    assert Result.load(path).rows == result.rows
    for row, learned in zip(
        result.rows, [0.3, 0.2] + [0.0] * 3 + [0.5, 0.2] + [0.0] * 3, strict=True
    ):
        row.figures |= {"before": 1.0, "after": 1.0 - learned}
    table = count_tables.landing_model_table(result)
    assert "| PEFT LoRA, fp32, r=8 | 0.0005 | 0.4000 | |" in table
    assert "| PEFT LoRA, bf16, r=8 | 0.0005 | 0.2000 | 0.2000 [" in table
