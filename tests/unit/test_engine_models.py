"""The models that a server imports are those that this project trains."""

import ast
from pathlib import Path

from megatron_ztrl.engines import sglang_models
from megatron_ztrl.engines.parameters import ARCHITECTURES


def test_every_architecture_that_can_be_trained_is_found_without_importing_all_others():
    tree = ast.parse((Path(sglang_models.__file__).parent / "trained.py").read_text())
    (entry,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    assert {name.id for name in entry.elts} == set(ARCHITECTURES)
