"""Against LoRA written into the modules by hand: the same gradients, at no more cost.

The figures are XLA's own, of the compiled step, so they do not depend on the machine's load.
"""

import jax
import numpy as np
import pytest
from by_hand import CASES, steps
from common import assert_close

SMALL = dict(tokens=(2, 128), width=256, hidden=704, heads=4)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan+remat"])
@pytest.mark.parametrize("case", CASES)
def test_no_dearer_than_by_hand(case, scan):
    (ours, args), (hand, hand_args) = steps(*CASES[case], **SMALL, scan=scan)
    (value, grads), (hand_value, hand_grads) = ours(*args), hand(*hand_args)
    np.testing.assert_allclose(value, hand_value, rtol=1e-6)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(hand_grads))
    compiled, hand_compiled = (f.lower(*a).compile() for f, a in ((ours, args), (hand, hand_args)))
    cost, hand_cost = compiled.cost_analysis(), hand_compiled.cost_analysis()
    bound = {"all linears r=16": 0.88, "q,v r=8": 1.0}[case]
    assert cost["flops"] <= hand_cost["flops"]
    assert cost["bytes accessed"] <= bound * hand_cost["bytes accessed"]
    memory, hand_memory = compiled.memory_analysis(), hand_compiled.memory_analysis()
    of_one_layer = sum(x.nbytes for x in jax.tree.leaves(args[0])) // 2  # copied side by side
    assert memory.temp_size_in_bytes <= hand_memory.temp_size_in_bytes + of_one_layer
