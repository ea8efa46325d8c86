"""The catalogue: literals that import no torch, made of parts and options that exist."""

import subprocess
import sys

import pytest

from rankfold.core.registry import AXES, entries, find
from rankfold.methods.catalogue import COMPOSITIONS


def test_importing_it_imports_no_torch():
    code = "import sys, rankfold.methods.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(COMPOSITIONS))
def test_every_part_is_a_member_and_every_option_belongs_to_one(name):
    composition = COMPOSITIONS[name]
    found = []
    for token in composition.parts.split("+"):
        axis, _, member = token.rpartition(":")
        hits = find(member, axis or None)
        assert len(hits) == 1, f"{token}: {[e.key for e in hits]} of {[e.key for e in entries()]}"
        found += hits
    for key in composition.options:
        part, _, option = key.rpartition(".")
        owners = [e for e in found if part in (e.name, e.axis)]
        assert len(owners) == 1, key
        assert option in [o.name for o in owners[0].options], f"{key}: {owners[0].options}"
    assert composition.doc.endswith(".")
    assert not any(e.name == name and e.axis == "structure" for a in AXES for e in entries(a))
