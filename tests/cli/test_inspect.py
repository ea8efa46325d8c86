"""`rankfold inspect`: the numbers are those of dense algebra, and what can't be known without the base is said."""

import json

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.jobs.exchange import export
from rankfold.jobs.inspect import NEEDS_BASE, NO_MATRIX, SHARED, inspect_adaptation, inspect_folder, inspect_model


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))


def adapted(method: str, **options) -> rf.Adaptation:
    adaptation = rf.adapt(model(), method, **options)
    generator = torch.Generator().manual_seed(1)
    for p in adaptation.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return adaptation


def dense_change(adaptation: rf.Adaptation, key: str) -> torch.Tensor:
    W = model().get_submodule(key).weight.detach().double()
    return adaptation.folded_weights()[f"{key}.weight"].double() - W


METHODS = {
    "lora": {"rank": 3, "alpha": 6.0}, "pissa": {"rank": 2}, "kron": {}, "shira": {"rank": 1}, "hadamard": {"rank": 2},
    "bone": {"rank": 2}, "dora": {"rank": 2}, "hra": {"rank": 2}, "hira": {"rank": 2}, "vera": {"rank": 3},
    "full": {}, "miss": {"rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_the_dense_change(method):
    adaptation = adapted(method, **METHODS[method])
    for row in inspect_adaptation(adaptation):
        change = dense_change(adaptation, row.site)
        S = torch.linalg.svdvals(change)
        p = S / S.sum()
        W = model().get_submodule(row.site).weight.detach().double()
        assert row.stats.frobenius == pytest.approx(float(change.norm()), rel=1e-4)
        assert row.stats.spectral == pytest.approx(float(S[0]), rel=1e-4)
        assert row.stats.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-3)
        assert row.stats.effective_rank == pytest.approx(float((-(p * p.clamp_min(1e-300).log()).sum()).exp()), rel=1e-2)
        assert row.relative == pytest.approx(float(change.norm() / W.norm()), rel=1e-4)


NOTES = {"dora": NEEDS_BASE, "hra": NEEDS_BASE, "hira": NEEDS_BASE, "bone": NEEDS_BASE, "full": NEEDS_BASE, "vera": SHARED}


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_alone_gives_the_same_numbers_or_says_what_it_needs(method, tmp_path):
    adaptation = adapted(method, **METHODS[method])
    adaptation.save(tmp_path / "a")
    whole = inspect_folder(tmp_path / "a", model()).rows
    alone = inspect_folder(tmp_path / "a").rows
    assert whole == inspect_adaptation(adaptation)
    for with_base, row in zip(whole, alone, strict=True):
        assert row.note == NOTES.get(method, "")
        assert (row.stats is None) == (method in NOTES)
        assert (row.site, row.rank, row.parameters) == (with_base.site, with_base.rank, with_base.parameters)
        if row.stats is not None:
            assert row.stats.frobenius == pytest.approx(with_base.stats.frobenius, rel=1e-5)


def test_a_change_of_the_input_has_no_spectrum(tmp_path):
    adaptation = adapted("mixture", rank=2)
    adaptation.save(tmp_path / "a")
    assert (
        {r.note for r in inspect_adaptation(adaptation)} == {r.note for r in inspect_folder(tmp_path / "a").rows} == {NO_MATRIX}
    )


def test_a_peft_folder(tmp_path):
    adaptation = adapted("lora", rank=2, alpha=3.0)
    export(adaptation.model, adaptation, "peft", tmp_path / "p")
    rows = {r.site: r for r in inspect_folder(tmp_path / "p").rows}
    for row in inspect_adaptation(adaptation):
        assert rows[row.site].stats.frobenius == pytest.approx(row.stats.frobenius, rel=1e-5)


def test_parameters_are_those_of_the_folder(tmp_path):
    adaptation = adapted("vera", rank=3)
    adaptation.save(tmp_path / "a")
    found = inspect_folder(tmp_path / "a")
    assert found.parameters == sum(t.numel() for t in adaptation.tensors().values())
    assert {name[-1] for name in found.shared} == {"A", "B"}
    assert found.base == adaptation.fingerprint().hash


def test_a_model_with_a_tie():
    m = model()
    m[2] = nn.Linear(12, 8)
    m[2].weight = m[0].weight
    rows = inspect_model(m).rows
    assert [r.note for r in rows] == ["shares 0", "shares 0"]
    assert rows[0].stats.spectral == pytest.approx(float(torch.linalg.svdvals(m[0].weight.double())[0].detach()), rel=1e-6)


# the command


def test_the_command_shows_sites_ranks_and_the_base(command, tmp_path):
    adaptation = adapted("dora", rank=2)
    adaptation.attached["default"].labels = ("no", "yes")
    adaptation.attached["default"].trained = {"steps": 7}
    adaptation.save(tmp_path / "a")
    code, out, _ = command("inspect", tmp_path / "a")
    assert code == 0
    for said in ("magnitude+lora", "no, yes", "steps: 7", adaptation.fingerprint().hash[:16], "8 x 12", NEEDS_BASE):
        assert said in out


def test_json_is_whole(command, tmp_path):
    adapted("lora", rank=2).save(tmp_path / "a")
    code, out, _ = command("inspect", tmp_path / "a", "--json")
    assert code == 0
    assert [row["rank"] for row in json.loads(out)["rows"]] == [2, 2]


def test_a_model_by_name(command):
    code, out, _ = command("inspect", "tiny-llama")
    assert code == 0
    assert "layers.0.self_attn.q_proj" in out


def test_looking_leaves_what_is_on(tmp_path):
    adaptation = adapted("lora", rank=2)
    adaptation.save(tmp_path / "a")
    inspect_folder(tmp_path / "a", adaptation.model)
    assert (list(adaptation.active), adaptation.names) == (["default"], ["default"])
