"""A run on disk: resumed in another process it is bitwise the run never stopped; killed while saving, nothing is lost."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rankfold as rf
from rankfold.adapters.files import read_tensors
from rankfold.errors import FileError, OptionError, RankfoldError
from rankfold.training.checkpoints import (
    ADAPTER,
    RunState,
    flatten,
    has_checkpoint,
    load_checkpoint,
    restore,
    save_checkpoint,
    unflatten,
)
from rankfold.training.loop import Interrupted, LoopSettings, train
from rankfold.training.saving import load

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import resuming  # noqa: E402  (beside this file)


def child(*arguments):
    command = [sys.executable, str(HERE / "resuming.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_resumed_in_a_new_process_is_bitwise_the_run_that_was_never_stopped(tmp_path):
    methods = list(resuming.METHODS)
    whole = {}
    for k, method in enumerate(methods):
        module, adaptation = resuming.fresh(method)
        whole[k] = resuming.run(module, adaptation, tmp_path / "none"), adaptation
        module, adaptation = resuming.fresh(method)
        with pytest.raises(Interrupted, match="after step 5 of 8; saved in"):
            resuming.run(module, adaptation, tmp_path / str(k) / "checkpoint", stop_after=5)
    ended = child(tmp_path, *methods)
    assert ended.returncode == 0, ended.stderr
    for k, (history, adaptation) in whole.items():
        found = read_tensors(tmp_path / str(k) / "resumed.safetensors")
        losses = found.pop("losses")
        assert losses.tolist() == history.losses
        tensors = [t.detach() for t in adaptation.tensors().values()]
        assert len(found) == len(tensors)
        for i, t in enumerate(tensors):
            assert torch.equal(found[f"t{i}"], t), (methods[k], i)


def test_the_policy_of_that_run_did_something(tmp_path):
    module, adaptation = resuming.fresh("adalora")
    history = resuming.run(module, adaptation, tmp_path)
    assert sum(history.changes["touched"].values()) > 0


def test_dropout_draws_differ_from_step_to_step(tmp_path):
    # the exactness above must not come from every step drawing the same mask
    module, adaptation = resuming.fresh("lora")
    masks = []
    module[1].register_forward_hook(lambda m, a, out: masks.append((out == 0).clone()) if m.training else None)
    resuming.run(module, adaptation, tmp_path)
    full = [m for m in masks if len(m) == 6]
    assert len({m.numpy().tobytes() for m in full}) == len(full) > 4


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_killed_while_saving_leaves_a_whole_checkpoint(tmp_path, where):
    folder = tmp_path / "checkpoint"
    ended = child("die", folder, where)
    assert ended.returncode == -9, ended.stderr
    state = load_checkpoint(folder)
    # killed while writing: the one before; killed between the renames: the new one was complete already
    assert state.step == (1 if where == "writing" else 2)
    module = resuming.model()
    assert len(load(module, folder / ADAPTER).sites) == 2


def saved(folder, method="lora"):
    module, adaptation = resuming.fresh(method)
    with pytest.raises(Interrupted):
        resuming.run(module, adaptation, folder, stop_after=2)
    return module, adaptation


def test_another_method_is_refused(tmp_path):
    saved(tmp_path / "c")
    _, other = resuming.fresh("adalora")
    with pytest.raises(FileError, match=r"rf\.load"):
        restore(tmp_path / "c", other, load_checkpoint(tmp_path / "c"))


def test_another_rank_is_refused(tmp_path):
    saved(tmp_path / "c")
    other = rf.adapt(resuming.model(), "lora", rank=3)
    with pytest.raises(FileError, match="rank changed"):
        restore(tmp_path / "c", other, load_checkpoint(tmp_path / "c"))


def test_other_data_or_seed_is_refused(tmp_path):
    saved(tmp_path / "c")
    module, adaptation = resuming.fresh("lora")
    changed = LoopSettings(**{**vars(resuming.settings(tmp_path / "c", resume=True)), "seed": 6})
    with pytest.raises(OptionError, match="seed = 5, this one has 6"):
        train(module, adaptation, resuming.source(), resuming.loss, changed)


def test_a_run_with_another_identity_is_refused(tmp_path):
    module, adaptation = resuming.fresh("lora")
    settings = LoopSettings(**{**vars(resuming.settings(tmp_path / "c")), "checkpoint_minutes": 1e-9})
    train(module, adaptation, resuming.source(), resuming.loss, settings, identity={"data": "a1"})
    again = LoopSettings(**{**vars(settings), "resume": True})
    with pytest.raises(OptionError, match="data = a1, this one has b2"):
        train(module, adaptation, resuming.source(), resuming.loss, again, identity={"data": "b2"})


def test_the_rate_may_change_on_resuming(tmp_path):
    saved(tmp_path / "c")
    module, adaptation = resuming.fresh("lora")
    faster = LoopSettings(**{**vars(resuming.settings(tmp_path / "c", resume=True)), "lr": 0.5, "schedule": "constant"})
    history = train(module, adaptation, resuming.source(), resuming.loss, faster)
    assert [r["lr"] for r in history.steps[2:]] == [0.5] * 6


def test_no_checkpoint_says_so(tmp_path):
    assert not has_checkpoint(tmp_path)
    with pytest.raises(FileError, match="no checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "keys", "tensor", "newer", "history"])
def test_a_damaged_checkpoint_is_an_error_of_ours(tmp_path, damage):
    saved(tmp_path / "c")
    path = tmp_path / "c" / "state.json"
    document = json.loads(path.read_text())
    if damage == "cut":
        path.write_text(path.read_text()[:-20])
    elif damage == "keys":
        path.write_text(json.dumps({**document, "more": 1}))
    elif damage == "newer":
        path.write_text(json.dumps({**document, "schema": 99}))
    elif damage == "history":
        document["tree"]["history"] = {"nothing": 1}
        path.write_text(json.dumps(document))
    else:
        path.write_text(path.read_text().replace('"t0"', '"t999"'))
    module, adaptation = resuming.fresh("lora")
    with pytest.raises(FileError):
        resuming.run(module, adaptation, tmp_path / "c", resume=True)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$tensor", "$float", "$tuple", "$items", "optimizer", "best", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "c"
    saved(folder)
    return folder


def read_or_refused(folder):
    with contextlib.suppress(RankfoldError):
        assert isinstance(load_checkpoint(folder), RunState)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["state.json", "state.safetensors"]), place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_fuzz_changed_bytes(whole, tmp_path, name, place, value):
    shutil.copytree(whole, tmp_path / "c", dirs_exist_ok=True)
    content = bytearray((tmp_path / "c" / name).read_bytes())
    content[place % len(content)] = value
    (tmp_path / "c" / name).write_bytes(bytes(content))
    read_or_refused(tmp_path / "c")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.sampled_from(["tree", "optimizer", "engine", "best", "history", "step", "identity"]), value=TREES)
def test_fuzz_documents(whole, tmp_path, part, value):
    shutil.copytree(whole, tmp_path / "c", dirs_exist_ok=True)
    document = json.loads((whole / "state.json").read_text())
    (document if part in document else document["tree"])[part] = value
    (tmp_path / "c" / "state.json").write_text(json.dumps(document))
    read_or_refused(tmp_path / "c")


def test_trees_survive_the_way_through_files():
    tree = {"a": [1, 2.5, None, True, "x"], "b": (torch.arange(3), {7: math.inf, "$k": math.nan}), "c": {}}
    tensors = {}
    back = unflatten(json.loads(json.dumps(flatten(tree, tensors), allow_nan=False)), tensors)
    assert back["a"] == tree["a"]
    assert back["c"] == {}
    assert torch.equal(back["b"][0], tree["b"][0])
    assert back["b"][1][7] == math.inf
    assert math.isnan(back["b"][1]["$k"])
    with pytest.raises(FileError, match="set"):
        flatten({"a": {1, 2}}, {})


def test_optimizer_state_is_written_without_pickle(tmp_path):
    saved(tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "c").rglob("*") if p.is_file()) == [
        "adapter.json", "adapter.safetensors", "state.json", "state.safetensors",
    ]  # fmt: skip
    state = load_checkpoint(tmp_path / "c")
    assert isinstance(state, RunState)
    moments = state.optimizer["state"]
    assert {"exp_avg", "exp_avg_sq", "step"} <= moments[0].keys()
    save_checkpoint(tmp_path / "d", resuming.fresh("lora")[1], state)
    assert load_checkpoint(tmp_path / "d").history == state.history
