"""Fingerprints: equal for equal numbers, near for another storage of them, different for anything else."""

import pytest
import torch

from rankfold.adapters import Fingerprint, compare, fingerprint


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(64, 100, generator=generator) * 0.02,
        "k": torch.randn(7, 3, generator=generator),
        "b": torch.zeros(5),
    }


def test_equal_numbers_are_one_base():
    w = weights()
    a = fingerprint(w)
    assert a == fingerprint({k: v.clone() for k, v in reversed(w.items())})
    assert hash(a) == hash(fingerprint(w))
    assert a == fingerprint({k: v.double() for k, v in w.items()}), "a cast that loses nothing"
    assert a == fingerprint({k: v.T.contiguous().T for k, v in w.items() if v.ndim == 2} | {"b": -w["b"]}), "layout and -0.0"
    assert compare(a, fingerprint(w)).verdict == "same"
    assert compare(a, fingerprint({**w, "more": torch.ones(3)})).verdict == "same", "only the source's names are looked at"


def test_every_hashed_entry_matters():
    w = weights()
    changed = {**w, "k": w["k"].clone()}
    changed["k"][6, 2] += 1e-6
    assert fingerprint(changed) != fingerprint(w)
    assert fingerprint({"x": w["k"]}) != fingerprint({"y": w["k"]})
    assert fingerprint({"x": w["k"]}) != fingerprint({"x": w["k"].T.reshape(7, 3)})
    assert fingerprint({"x": torch.ones(2, 3)}) != fingerprint({"x": torch.ones(3, 2)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_another_storage_both_ways(dtype):
    w = weights()
    a, b = fingerprint(w), fingerprint({k: v.to(dtype) for k, v in w.items()})
    for got in (compare(a, b), compare(b, a)):
        assert got.verdict == "same source, other storage"
        assert 0 < got.distance < 5e-3
        assert got.worst in w
        assert got.worst in str(got)
    back = fingerprint({k: v.to(dtype).float() for k, v in w.items()})
    assert compare(b, back).verdict == "same", "held wider without a change"


def test_between_two_narrow_formats():
    w = weights()
    a, b = (fingerprint({k: v.to(t) for k, v in w.items()}) for t in (torch.bfloat16, torch.float16))
    assert compare(a, b).verdict == "same source, other storage"


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.02), (4, 0.2)])
def test_a_quantised_copy_is_another_storage(bits, largest):
    w = weights()
    levels = 2 ** (bits - 1) - 1
    step = w["q"].abs().amax(1, keepdim=True) / levels
    quantised = {"q": (w["q"] / step).round() * step}
    a, b = fingerprint({"q": w["q"]}), fingerprint(quantised, storage=f"int{bits}")
    for got in (compare(a, b), compare(b, a)):
        assert got.verdict == "same source, other storage"
        assert 0 < got.distance < largest
    assert compare(a, fingerprint(quantised)).verdict == "different", "without a word on storage, these are other numbers"


def test_another_base_is_different():
    w = weights()
    a = fingerprint(w)
    assert compare(a, fingerprint(weights(1))).verdict == "different"
    tuned = {**w, "q": w["q"] + 1e-4 * torch.randn(64, 100)}
    for dtype in (torch.float32, torch.bfloat16):
        assert compare(a, fingerprint({k: v.to(dtype) for k, v in tuned.items()})).verdict == "different", "a fine-tuned copy"
    assert "no weight 'k'" in compare(a, fingerprint({"q": w["q"]})).reason
    assert "[7, 3]" in compare(a, fingerprint({**w, "k": w["k"][:2]})).reason
    assert compare(a, fingerprint(weights(1), storage="nf4")).verdict == "different"


def test_odd_tensors():
    odd = {
        "number": torch.tensor(3.0),
        "empty": torch.ones(0, 4),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "int": torch.arange(9),
    }
    assert fingerprint(odd) == fingerprint(odd)
    assert compare(fingerprint(odd), fingerprint(odd)).verdict == "same"
    assert compare(fingerprint({"z": torch.zeros(4)}), fingerprint({"z": torch.ones(4)}, storage="nf4")).verdict == "different"
    assert Fingerprint({}).hash == Fingerprint({}).hash


def test_the_hash_is_fixed():
    """Files hold these hashes: the recipe must not drift."""
    w = torch.arange(10_000.0).view(100, 100) / 7
    assert fingerprint({"w": w}).tensors["w"].hash == "8df7f2f9aa4f28206caecd6369c9fa538b9b1ea4e7fe97f8b6fadbabd49669b3"
