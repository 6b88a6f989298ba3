"""PEFT's additive types beside LoRA. Each has the names of its tensors, the sizes that they imply,
and the update ΔW (out, in) that it makes of them, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lora_jax.peft._config import PeftConfig
from lora_jax.peft._form import Arrays, Form, Misfit, Place, Shapes, axes_of, equal, has


def _loha_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    pair = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    core = tuple(n for n in ("hada_t1", "hada_t2") if n in shapes)
    has(shapes, *pair, *(("hada_t1", "hada_t2") if core else ()))
    axes_of(shapes, **dict.fromkeys(pair, 2), hada_t1=4, hada_t2=4)
    for i, name in enumerate(("hada_w1_a", "hada_w1_b")):
        equal("the shapes of its two factors", shapes[name], shapes[pair[2 + i]])
    # w_a (out, r), w_b (r, in); with a core (r, out), (r, in) around (r, r, *window).
    (a, b), rank = (shapes["hada_w1_a"], shapes["hada_w1_b"]), shapes["hada_w1_b"][0]
    equal("its ranks", rank, a[0] if core else a[1], *(n for c in core for n in shapes[c][:2]))
    if not core:
        return a[0], b[1], rank
    equal("the shapes of its two cores", shapes["hada_t1"], shapes["hada_t2"])
    return a[1], b[1] * math.prod(shapes["hada_t1"][2:]), rank


def _loha(t: Arrays, at: Place) -> np.ndarray:
    """(w1a·w1b) ∘ (w2a·w2b), arXiv:2108.06098; of a convolution with a core (r, r, *window)."""

    def factor(n: int) -> np.ndarray:
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        if "hada_t1" not in t:
            return a @ b
        # (out, in, *window), the inputs of a convolution in one axis.
        return _cp(t[f"hada_t{n}"], a, b).reshape(at.n_out, -1)

    return factor(1) * factor(2) * at.config.scale(at.module, at.rank)


def _cp(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Σ core[i, j, ·] a[i, out] b[j, in]: (out, in, *window)."""
    half = np.einsum("ijkl,jr->irkl", core, b)
    return np.einsum("irkl,ip->prkl", half, a)


def _lokr_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    first = ("lokr_w1",) if "lokr_w1" in shapes else ("lokr_w1_a", "lokr_w1_b")
    second = ("lokr_w2",) if "lokr_w2" in shapes else ("lokr_w2_a", "lokr_w2_b")
    core = ("lokr_t2",) if "lokr_t2" in shapes else ()
    has(shapes, *first, *second, *core)
    axes_of(shapes, lokr_w1=2, lokr_w1_a=2, lokr_w1_b=2, lokr_w2_a=2, lokr_w2_b=2, lokr_t2=4)
    axes_of(shapes, lokr_w2=(2, 3, 4))
    # w1 (out₁, in₁) and w2 (out₂, in₂, *window), each whole or of two factors.
    one = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    ranks = [n for f in (first,) if len(f) > 1 for n in (shapes[f[0]][1], shapes[f[1]][0])]
    two = shapes.get("lokr_w2", ())
    if not two:
        (a, b), turned = (shapes[n] for n in second), bool(core)
        # With a core the factors are (r, out₂), (r, in₂), without (out₂, r), (r, in₂).
        two = (a[1], b[1], *shapes["lokr_t2"][2:]) if turned else (a[0], b[1])
        ranks += [a[0] if turned else a[1], b[0], *(n for c in core for n in shapes[c][:2])]
    # PEFT would take w2 and leave the core.
    if core and len(second) == 1:
        raise Misfit("also has lokr_t2")
    equal("its ranks", *ranks)
    return one[0] * two[0], one[1] * math.prod(two[1:]), ranks[0] if ranks else 0


def _lokr(t: Arrays, at: Place) -> np.ndarray:
    """scale · w1 ⊗ w2, arXiv:2309.14859."""
    one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        two = t["lokr_w2"]
    elif "lokr_t2" in t:
        two = _cp(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        two = t["lokr_w2_a"] @ t["lokr_w2_b"]
    # As PEFT: of windows of one axis, w1 has its new axis in front, and none behind.
    one = one[:, :, None, None] if two.ndim == 4 else one
    return np.kron(one, two).reshape(at.n_out, at.n_in) * at.config.scale(at.module, at.rank)


def _miss_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    has(shapes, "miss_block")
    shape, init = shapes["miss_block"], config.own["init_weights"]
    axes_of(shapes, miss_block=3 if init == "bat" else 2)
    if init == "bat":
        equal("the sides of its blocks", *shape[1:])
        return shape[0] * shape[1], 0, shape[1]
    if init == "mini":
        equal("mini_r and the block's columns", config.own["mini_r"], shape[1])
        return 0, 0, shape[0]
    return shape[1], 0, shape[0]


def _miss(t: Arrays, at: Place) -> np.ndarray:
    """Rows of W share a block, arXiv:2409.15371: ΔW[o, i] = block[i mod r, o]; "bat" is
    (W + 1)·block on each square of r × r."""
    block = t["miss_block"]
    if at.config.own["init_weights"] == "bat":
        r = block.shape[-1]
        if at.n_in % r:
            raise Misfit(f"in {at.n_in} is no multiple of its blocks of {r}")
        # w (out/r, r, in/r, r), block (out/r, r, r): one for each row of squares.
        w = at.weight.reshape(at.n_out // r, r, -1, r)
        new = np.einsum("oaib,obc->oaic", w, block) + block[:, :, None, :]
        return new.reshape(at.n_out, at.n_in)
    if at.n_out % block.shape[1]:
        raise Misfit(f"out {at.n_out} is no multiple of mini_r={block.shape[1]}")
    # (r, mini_r) to (r, out).
    block = np.tile(block, (1, at.n_out // block.shape[1]))
    # Input i has row i mod r: (in, out), turned.
    return block[np.arange(at.n_in) % len(block)].T


def _hira_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    table = "hira_embedding_A" in shapes or "hira_embedding_B" in shapes
    names = ("hira_embedding_A", "hira_embedding_B") if table else ("hira_A", "hira_B")
    has(shapes, *names)
    axes_of(shapes, **dict.fromkeys(names, 2 if table else (2, 3, 4, 5)))
    a, b = (shapes[n] for n in names)
    equal("its ranks", a[0], b[1])
    equal("the windows of its B", math.prod(b[2:]), 1)
    # No scale depends on its rank, and PEFT reads no pattern.
    return b[0], math.prod(a[1:]), 0


def _hira(t: Arrays, at: Place) -> np.ndarray:
    """W ∘ (B·A), HiRA (ICLR 2025)."""
    # The names of linear layers and of tables end in A and in B.
    a, b = (next(x for name, x in t.items() if name.endswith(end)) for end in "AB")
    return at.weight * (b.reshape(at.n_out, -1) @ a.reshape(len(a), -1))


def _vera_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    own = ("vera_lambda_b", "vera_lambda_d")
    if not {"vera_A", "vera_B"} <= set(shapes):
        raise Misfit(
            "the shared vera_A and vera_B are not in the file, and torch's generator made them; "
            "save it in PEFT with save_projection=True"
        )
    has(shapes, *own, "vera_A", "vera_B")
    axes_of(shapes, **dict.fromkeys(own, 1), vera_A=2, vera_B=2)
    (n_out,), (rank,) = shapes["vera_lambda_b"], shapes["vera_lambda_d"]
    equal("its ranks", rank, shapes["vera_A"][0], shapes["vera_B"][1])
    if n_out > shapes["vera_B"][0]:
        raise Misfit(f"out {n_out}, but vera_B is {shapes['vera_B']}")
    # vera_A is as wide as the widest module: in is that of the leaf.
    return n_out, 0, rank


def _vera(t: Arrays, at: Place) -> np.ndarray:
    """Λ_b·B·Λ_d·A, arXiv:2310.11454, with the first rows and columns of the shared B and A."""
    if at.n_in > t["vera_A"].shape[1]:
        raise Misfit(f"in {at.n_in}, but vera_A is {t['vera_A'].shape}")
    # (out, r), and below (r, in).
    b = t["vera_lambda_b"][:, None] * t["vera_B"][: at.n_out]
    return b @ (t["vera_lambda_d"][:, None] * t["vera_A"][:, : at.n_in])


def _gralora_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    general = ("gralora_A_general.weight", "gralora_B_general.weight")
    both = any(n in shapes for n in general)
    has(shapes, "gralora_A", "gralora_B", *(general if both else ()))
    axes_of(shapes, gralora_A=3, gralora_B=3, **dict.fromkeys(general, 2))
    (k, n_in, rank), (k_b, rank_b, n_out) = shapes["gralora_A"], shapes["gralora_B"]
    equal("its blocks", k, k_b)
    equal("its ranks", rank, rank_b)
    equal("the remainder of its rank by its blocks", rank % k, 0)
    if both:
        a, b = (shapes[n] for n in general)
        equal("the shapes of its general factors", (a[0], k * n_in), (b[1], a[1]))
        equal("its outputs", k * n_out, b[0])
    return k * n_out, k * n_in, rank


def _gralora(t: Arrays, at: Place) -> np.ndarray:
    """Blocks of a k × k grid with factors of their own, arXiv:2505.20355; maybe a LoRA beside."""
    # (k, in/k, r), (k, r, out/k).
    a, b = t["gralora_A"], t["gralora_B"]
    k, rank = len(a), a.shape[2]
    # A's ranks of each block n of the inputs are shared out among the k blocks o of the outputs.
    grid = np.einsum(
        "nikr,knro->koni",
        a.reshape(k, -1, k, rank // k),
        b.reshape(k, k, rank // k, -1),
    ).reshape(at.n_out, at.n_in)
    hybrid = 0
    if "gralora_A_general.weight" in t:
        general = t["gralora_A_general.weight"]
        grid, hybrid = grid + t["gralora_B_general.weight"] @ general, len(general)
    # By the sum of both ranks.
    return grid * (at.config.alpha / (rank + hybrid))


def _fourier_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    has(shapes, "fourierft_spectrum")
    axes_of(shapes, fourierft_spectrum=1)
    return 0, 0, 0


def _fourier(t: Arrays, at: Place) -> np.ndarray:
    """The real part of an inverse Fourier transform, arXiv:2405.03003, of n frequencies that
    torch's generator chose."""
    spectrum, size = t["fourierft_spectrum"], at.n_out * at.n_in
    # From 2³²/20 on torch draws 64 bits a place.
    if not len(spectrum) <= size < (1 << 32) // 20:
        raise Misfit(f"{len(spectrum):,} frequencies of a matrix of {size:,}")
    dense = np.zeros(size)
    dense[_randperm(size, len(spectrum), at.config.own["random_loc_seed"])] = spectrum
    dense = dense.reshape(at.n_out, at.n_in)
    return np.fft.ifft2(dense).real * at.config.own["scaling"]


def _randperm(n: int, first: int, seed: int) -> np.ndarray:
    """The first places of torch.randperm(n) on a CPU: Fisher and Yates' shuffle, with remainders of
    32 random bits of MT19937."""
    source = np.random.RandomState(seed)
    draws = np.frombuffer(source.bytes(4 * min(first, n - 1)), "<u4")
    # The places that have been swapped: not all n, which may be a weight's.
    moved: dict[int, int] = {}
    out = np.arange(first)
    for i, bits in enumerate(draws):
        j = i + int(bits) % (n - i)
        out[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    # The last place is not drawn: it is what is left.
    if first == n > 1:
        out[-1] = moved.get(n - 1, n - 1)
    return out


def _shira_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    has(shapes, "shira_weight", "shira_indices")
    axes_of(shapes, shira_weight=1, shira_indices=2)
    equal("the shapes of its places", shapes["shira_indices"], (2, shapes["shira_weight"][0]))
    return 0, 0, 0


def _shira(t: Arrays, at: Place) -> np.ndarray:
    """Single places of the weight, arXiv:2406.13175."""
    rows, columns = t["shira_indices"]
    if not (0 <= rows.min() and rows.max() < at.n_out):
        raise Misfit(f"shira_indices: rows from {rows.min()} to {rows.max()} of {at.n_out}")
    if not (0 <= columns.min() and columns.max() < at.n_in):
        raise Misfit(f"shira_indices: columns to {columns.max()} of {at.n_in}")
    out = np.zeros((at.n_out, at.n_in))
    # `out[...] +=` would add once where a place is there twice.
    np.add.at(out, (rows, columns), t["shira_weight"])
    return out


def _ia3_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    has(shapes, "ia3_l")
    axes_of(shapes, ia3_l=(2, 3, 4, 5))
    shape, inputs = shapes["ia3_l"], config.scales_inputs(module)
    # (out, 1) or (1, in); of a convolution (1, out, 1, …) or (1, in, 1, …).
    axis = 0 if len(shape) == 2 and not inputs else 1
    if math.prod(shape) != shape[axis]:
        of = "inputs" if inputs else "outputs"
        raise Misfit(f"ia3_l {shape}: expected a vector along axis {axis}, as it scales {of}")
    if not inputs:
        return shape[axis], 0, 0
    # The channels of a convolution are not its inputs, which have the window too.
    return 0, 0 if len(shape) > 2 else shape[axis], 0


def _ia3(t: Arrays, at: Place) -> np.ndarray:
    """W scaled by its rows, or by its columns where it is a feed-forward's, arXiv:2205.05638."""
    scale = t["ia3_l"].reshape(-1) - 1
    if not at.config.scales_inputs(at.module):
        return at.weight * scale[:, None]
    if at.n_in % len(scale):
        raise Misfit(f"ia3_l of {len(scale)} for in {at.n_in}")
    # Each channel with all of its window.
    return at.weight * np.repeat(scale, at.n_in // len(scale))


def _oft_sizes(shapes: Shapes, config: PeftConfig, module: str) -> tuple[int, int, int]:
    table = "oft_embedding_R.weight" in shapes
    name = "oft_embedding_R.weight" if table else "oft_R.weight"
    has(shapes, name)
    shape = shapes[name]
    # (blocks, 0) of blocks of one input, which have nothing to turn.
    if len(shape) != 2 or not shape[0]:
        raise Misfit(f"{name} {shape}: expected 2 axes")
    blocks, side = shape[0], _side(shape[1])
    if side * (side - 1) // 2 != shape[1]:
        raise Misfit(f"oft_R {shape}: no triangle has so many elements")
    if config.own["block_share"]:
        equal("the blocks that are shared", blocks, 1)
    # One rotation may turn all blocks of the inputs, or of a table's features.
    turned = 0 if blocks == 1 else blocks * side
    return (turned, 0, 0) if table else (0, turned, 0)


def _side(elements: int) -> int:
    # side (side − 1) / 2 elements are above the diagonal.
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def _oft(t: Arrays, at: Place) -> np.ndarray:
    """W·(Rᵀ − 1) with a rotation R of blocks, arXiv:2306.07280; of a table, table·(R − 1)."""
    own, (vectors,), table = at.config.own, t.values(), "oft_embedding_R.weight" in t
    # (out, in), or (tokens, features).
    w = at.weight.T if table else at.weight
    blocks, side, n = len(vectors), _side(vectors.shape[1]), w.shape[1]
    if n % side or (blocks > 1 and n != blocks * side):
        raise Misfit(f"{blocks} rotations of {side} for {'features' if table else 'in'} {n}")
    q = np.zeros((blocks, side, side))
    # Skew, from what is above the diagonal, row by row.
    q[:, *np.triu_indices(side, 1)] = vectors
    q -= q.swapaxes(1, 2)
    if own["coft"]:
        # COFT: each block no further than this from the identity.
        most = own["eps"] / math.sqrt(blocks)
        norm = np.linalg.norm(q, axis=(1, 2), keepdims=True)
        q = np.where(norm <= most, q, most * q / np.where(norm > 0, norm, 1))
    eye = np.eye(side)
    if own["use_cayley_neumann"]:
        r = _neumann(q, own["num_cayley_neumann_terms"])
    else:
        # Cayley's (1 − q)(1 + q)⁻¹; 1 + q is regular for every skew q, but for rounding.
        r = (eye - q) @ np.linalg.inv(eye + q)
    # (out, in/side, side), each block of inputs times its own Rᵀ − 1.
    r = np.broadcast_to(r - eye, (n // side, side, side))
    r = r.swapaxes(1, 2) if table else r
    new = np.einsum("onb,nab->ona", w.reshape(len(w), -1, side), r).reshape(w.shape)
    return new.T if table else new


def _neumann(q: np.ndarray, terms: int) -> np.ndarray:
    """1 + 2q + 2q² + … + qⁿ⁻¹, as PEFT cuts the series of (1 − q)(1 + q)⁻¹ off."""
    if terms > 64:
        raise Misfit(f"num_cayley_neumann_terms={terms}: expected at most 64")
    r, power = np.broadcast_to(np.eye(q.shape[1]), q.shape), q
    if terms > 1:
        r = r + 2 * q
    if terms > 2:
        power = q @ q
        r = r + 2 * power
        for _ in range(3, terms - 1):
            power = power @ q
            r = r + 2 * power
        r = r + power @ q
    return r


FORMS: Mapping[str, Form] = {
    "LOHA": Form(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        _loha_sizes,
        _loha,
    ),
    "LOKR": Form(
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        _lokr_sizes,
        _lokr,
    ),
    "MISS": Form(("miss_block",), _miss_sizes, _miss),
    "HIRA": Form(
        ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"), _hira_sizes, _hira, True
    ),
    "VERA": Form(("vera_lambda_b", "vera_lambda_d"), _vera_sizes, _vera),
    "GRALORA": Form(
        ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
        _gralora_sizes,
        _gralora,
    ),
    "FOURIERFT": Form(("fourierft_spectrum",), _fourier_sizes, _fourier),
    "SHIRA": Form(("shira_weight", "shira_indices"), _shira_sizes, _shira),
    "IA3": Form(("ia3_l",), _ia3_sizes, _ia3, True),
    "OFT": Form(("oft_R.weight", "oft_embedding_R.weight"), _oft_sizes, _oft, True),
}
