"""Golden adapters, damaged: a strategy of ways to do it."""

from __future__ import annotations

import math
import os
import shutil
import struct

import golden_models as g
import numpy as np
from damage_values import (
    EDGES,
    EXPRESSIONS,
    JSON,
    LARGE,
    MODULES,
    NAMES,
    PREFIX,
    TAILS,
)  # fmt: skip
from damage_work import Work
from hypothesis import strategies as st
from test_peft import MODELS

from lora_jax.peft._file import CONFIG, TENSORS
from lora_jax.peft._settings import OTHERS

STAGES: list[dict] = [{}, {}, {}, {}]  # tensors and settings, header, bytes, files


def damage(stage):
    def register(fn):
        STAGES[stage][fn.__name__] = fn
        return fn

    return register


SETTINGS = sorted({k for n in MODELS for k in Work.golden(n).config} | {"init_r", "unknown"})
OWN = sorted({k for _, own in OTHERS.values() for k in own} | {"lora_parameters", "fine_tune_type"})


def some(draw, items):
    return items[draw(st.integers(0, len(items) - 1))]


def position(draw, items, more=0):
    return draw(st.integers(0, max(0, len(items) - 1 + more)))


# Stage 0: tensors and settings that are well formed, and wrong


@damage(0)
def lost_tensor(w, draw):
    del w.tensors[position(draw, w.tensors)]


@damage(0)
def lost_module(w, draw):
    module = some(draw, w.tensors)[0].partition(".lora_")[0]
    w.tensors = [t for t in w.tensors if not t[0].startswith(module)]


@damage(0)
def renamed(w, draw):
    t, other = some(draw, w.tensors), some(draw, w.tensors)[0]
    short = t[0].removeprefix(PREFIX)
    module, _, tail = t[0].partition(".lora_")
    known = PREFIX + draw(st.sampled_from(MODULES)) + "." + draw(st.sampled_from(TAILS))
    named = t[0].replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")
    nests = module + ".base_layer" + (".lora_" + tail if tail else "")
    names = [other, short, known, named, nests, t[0].upper(), PREFIX + t[0], short + ".x", *NAMES]
    t[0] = some(draw, names)


@damage(0)
def other_names(w, draw):
    """All of them, or one, as another part of a model, a compiled one or another adapter has it."""
    part = draw(st.sampled_from(["vision_tower.", "decoder.", "_orig_mod."]))
    ways = [
        lambda k: PREFIX + part + k.removeprefix(PREFIX),
        lambda k: k.removeprefix(PREFIX),
        lambda k: "module." + k,
        lambda k: k.replace(".weight", ".default_0.weight"),
        lambda k: k.replace(".lora_", "._orig_mod.lora_"),
        lambda k: k.replace(PREFIX, PREFIX + "model.lora_gate."),
    ]
    way = some(draw, ways)
    for t in w.tensors if draw(st.booleans()) else [some(draw, w.tensors)]:
        t[0] = way(t[0])


@damage(0)
def names_exchanged(w, draw):
    a, b = some(draw, w.tensors), some(draw, w.tensors)
    a[0], b[0] = b[0], a[0]


@damage(0)
def doubled(w, draw):
    t = some(draw, w.tensors)
    name = draw(st.sampled_from([t[0], t[0] + "2", t[0].replace("lora_A.", "lora_A.default.")]))
    w.tensors.append([name, *t[1:]])


@damage(0)
def other_shape(w, draw):
    t = some(draw, w.tensors)
    n = math.prod(t[2])
    rest = [[n], [1, n], [n, 1], [1, *t[2]], [*t[2], 1], [2, n // 2], [1] * 9 + [n], [n // 4, 4]]
    t[2] = some(draw, [t[2][::-1], *rest])


@damage(0)
def other_rank(w, draw):
    """A, or A and B of one module, with fewer ranks or more."""
    arrays = {t[0]: t for t in w.tensors}
    a = some(draw, [k for k in arrays if "_A" in k] or list(arrays))
    rank = draw(st.sampled_from([0, 1, 2, 5, 64]))
    both = draw(st.booleans())
    for key, axis in ((a, 0), (a.replace("_A", "_B"), 1)):
        t = arrays.get(key)
        if t is None or len(t[2]) <= axis or (axis and not both) or t[1] != "F32":
            continue
        value = np.frombuffer(t[3], np.float32)
        if value.size == math.prod(t[2]) and 0 not in t[2]:
            value = np.resize(value.reshape(t[2]).swapaxes(0, axis), (rank, *np.delete(t[2], axis)))
            t[2], t[3] = (y := value.swapaxes(0, axis)).shape, y.tobytes()


@damage(0)
def other_values(w, draw):
    t = some(draw, w.tensors)
    bits = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0, 7.0]))
    data, at = bytearray(t[3]), position(draw, t[3])
    data[at - at % 4 : at - at % 4 + 4] = np.float32(bits).tobytes()
    t[3] = bytes(data[: len(t[3])])


@damage(0)
def other_type(w, draw):
    t = some(draw, w.tensors)
    t[1] = draw(st.sampled_from("F16 BF16 F64 I8 U8 I32 U64 BOOL F8_E4M3 F4 f32 C64".split()))
    if draw(st.booleans()):  # as many bytes as it says
        size = {"F16": 2, "BF16": 2, "F64": 8, "I8": 1, "U8": 1, "BOOL": 1, "U64": 8}.get(t[1], 4)
        t[3] = np.resize(np.frombuffer(t[3], np.uint8), size * math.prod(t[2])).tobytes()


@damage(0)
def more_tensors(w, draw):
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 10, 11, 12, 16]), max_size=4)
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(sizes)
        name = draw(st.sampled_from(MODULES)) + "." + draw(st.sampled_from(TAILS))
        w.tensors.append([PREFIX + name, "F32", shape, bytes(4 * math.prod(shape))])


@damage(0)
def setting(w, draw):
    w.config[draw(st.sampled_from(SETTINGS))] = draw(JSON)


@damage(0)
def own_setting(w, draw):
    """One of the other types', or of mlx-lm's."""
    w.config[draw(st.sampled_from(OWN))] = draw(JSON)


@damage(0)
def lost_setting(w, draw):
    w.config.pop(draw(st.sampled_from(SETTINGS)), None)


@damage(0)
def numbers(w, draw):
    """Settings that PEFT may write, and that mean something else."""
    name = draw(st.sampled_from(["r", "lora_alpha", "use_rslora", "peft_version", "bias"]))
    values = {"use_rslora": [True, False], "bias": ["all", "lora_only"], "peft_version": ["0.18.1"]}
    w.config[name] = draw(st.sampled_from(values.get(name, [1, 2, 64, 10**6, 2**24, 0, -3, 0.5])))


@damage(0)
def patterns(w, draw):
    keys = st.sampled_from(MODULES + EXPRESSIONS)
    values = st.sampled_from([1, 2, 9, 0.25, 0, -1, 1e300, "2", True])
    name = draw(st.sampled_from(["rank_pattern", "alpha_pattern"]))
    w.config[name] = draw(st.dictionaries(keys, values, min_size=1, max_size=3))


@damage(0)
def targets(w, draw):
    name = draw(st.sampled_from(["target_modules", "exclude_modules", "target_parameters"]))
    lists = st.lists(st.sampled_from(MODULES + EXPRESSIONS), max_size=4)
    w.config[name] = draw(st.sampled_from(EXPRESSIONS) | lists)


@damage(0)
def other_kind(w, draw):
    changes = [{"peft_type": "ADALORA"}, {"peft_type": "ADALORA", "init_r": 12}, {"use_dora": True}]
    changes += [
        {"peft_type": draw(st.sampled_from(["BOFT", *OTHERS]))},
        {"trainable_token_indices": {"emb": [3, 1]}},
        {"r": 1},
    ]
    w.config |= some(draw, changes)


# Stage 1: a header that lies


def an_entry(w, draw):
    return some(draw, [entry for _, entry in w.header if isinstance(entry, dict)] or [{}])


@damage(1)
def field(w, draw):
    entry = an_entry(w, draw)
    lists = st.lists(st.sampled_from(EDGES), max_size=9)
    entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(JSON | lists)


@damage(1)
def lost_field(w, draw):
    an_entry(w, draw).pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)


@damage(1)
def offsets(w, draw):
    """Overlapping, out of order, beyond the end."""
    entry, other = an_entry(w, draw), an_entry(w, draw)
    old = entry.get("data_offsets")
    if isinstance(old, list) and len(old) == 2 and all(type(n) is int for n in old):
        by = draw(st.integers(-64, 64) | st.sampled_from([2**32, 2**63]))
        start, stop = old
        ways = [[start + by, stop + by], [stop, start], [start, stop + by], [start - by, stop]]
        entry["data_offsets"] = some(draw, [*ways, other.get("data_offsets")])


@damage(1)
def order(w, draw):
    w.header = draw(st.permutations(w.header))


@damage(1)
def same_entry_twice(w, draw):
    w.header.append(some(draw, w.header))


@damage(1)
def metadata(w, draw):
    w.header.insert(position(draw, w.header, 1), ["__metadata__", draw(JSON)])


# Stage 2: bytes


@damage(2)
def flipped(w, draw):
    data = w.files[some(draw, [TENSORS, TENSORS, CONFIG])]
    end = draw(st.sampled_from([8, 64, 400, len(data)]))  # mostly where the length and header are
    for _ in range(draw(st.integers(1, 4))):
        if data:
            data[draw(st.integers(0, min(end, len(data)) - 1))] ^= draw(st.integers(1, 255))


@damage(2)
def cut(w, draw):
    name = some(draw, [TENSORS, CONFIG])
    del w.files[name][position(draw, w.files[name]) :]


@damage(2)
def inserted(w, draw):
    data = w.files[some(draw, [TENSORS, CONFIG])]
    at = some(draw, [0, 8, 9, len(data), draw(st.integers(0, len(data)))])
    data[at:at] = draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b" ", b"\0" * 8, b"{"]))


@damage(2)
def removed(w, draw):
    data = w.files[some(draw, [TENSORS, CONFIG])]
    at = position(draw, data)
    del data[at : at + draw(st.integers(1, 16))]


@damage(2)
def length(w, draw):
    data = w.files[TENSORS]
    n = int.from_bytes(data[:8], "little")
    lies = [0, 1, 2, n - 1, n + 1, n + 4, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1, 10**8]
    data[:8] = struct.pack("<Q", max(0, some(draw, lies)) % 2**64)


@damage(2)
def other_header(w, draw):
    text = some(draw, LARGE)
    n = int.from_bytes(w.files[TENSORS][:8], "little")
    w.files[TENSORS] = bytearray(struct.pack("<Q", len(text)) + text + w.files[TENSORS][8 + n :])


@damage(2)
def other_contents(w, draw):
    name = some(draw, [TENSORS, CONFIG])
    golden = (g.folder(draw(st.sampled_from(sorted(MODELS)))) / name).read_bytes()
    w.files[name] = bytearray(some(draw, [golden, *LARGE, w.files[TENSORS], w.files[CONFIG]]))


# Stage 3: files


def no_file(folder, name):
    path = folder / name
    path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    return path


def linked(folder, name, to):
    no_file(folder, name).symlink_to(to)


@damage(3)
def other_file(w, draw):
    name = some(draw, [TENSORS, CONFIG])
    ways = {
        "lost": lambda f: no_file(f, name),
        "a pickle": lambda f: (f / name).rename(f / "adapter_model.bin"),
        "a folder": lambda f: no_file(f, name).mkdir(),
        "a pipe": lambda f: os.mkfifo(no_file(f, name)),
        "a link": lambda f: ((f / name).rename(f / "blob"), (f / name).symlink_to("blob")),
        "a link to nothing": lambda f: linked(f, name, "nothing"),
        "a link to itself": lambda f: linked(f, name, name),
        "a link to a device": lambda f: linked(f, name, "/dev/zero"),
        "a link to the folder": lambda f: linked(f, name, "."),
        "sparse": lambda f: os.truncate(f / name, 10 << 30),
    }
    w.then[name] = ways[draw(st.sampled_from(sorted(ways)))]  # once all is written


@st.composite
def cases(draw, name=None):
    """(golden, damages, Work): one to three damages of a golden adapter, ready to be written."""
    w = Work.golden(name or draw(st.sampled_from(sorted(MODELS))))
    kinds = st.sampled_from([(i, n) for i, s in enumerate(STAGES) for n in s])
    most = draw(st.sampled_from([1, 1, 1, 2, 3]))
    chosen = draw(st.lists(kinds, min_size=1, max_size=most))
    for stage in range(4):
        if stage == 1:
            w.laid_out()
        if stage == 2:
            w.packed()
        for s, n in chosen:
            if s == stage and (w.tensors if stage == 0 else w.header if stage == 1 else True):
                STAGES[s][n](w, draw)
    return w.name, tuple(n for _, n in sorted(chosen)), w
