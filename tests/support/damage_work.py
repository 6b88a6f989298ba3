"""An adapter on its way to the disk, where tests/support/damage.py gets hold of it."""

from __future__ import annotations

import dataclasses
import json
import struct

import golden_models as g

from lora_jax.peft._file import CONFIG, TENSORS


@dataclasses.dataclass(repr=False)
class Work:
    """An adapter on its way to the disk."""

    name: str
    config: dict
    tensors: list  # [name, dtype, shape, bytes]
    header: list = dataclasses.field(default_factory=list)  # [name, entry]
    files: dict = dataclasses.field(default_factory=dict)
    then: dict = dataclasses.field(default_factory=dict)  # {file: what happens to it}

    @classmethod
    def golden(cls, name):
        """Of tests/data/peft_golden, or "../formats/…" for one of another kind."""
        path = g.folder(name) / CONFIG
        config = json.loads(path.read_text()) if path.exists() else {}
        types = {"float32": "F32", "bfloat16": "BF16", "int32": "I32"}
        arrays = g.tensors(tensors_of(g.folder(name))).items()
        return cls(
            name, config, [[k, types[str(v.dtype)], list(v.shape), v.tobytes()] for k, v in arrays]
        )

    def __repr__(self):
        """What is not as it was."""
        was = Work.golden(self.name)
        config = {k: v for k, v in self.config.items() if was.config.get(k, self) != v}
        lost = sorted(was.config.keys() - self.config.keys())
        tensors = [t[:3] for t in self.tensors if t not in was.tensors]
        header = [h for h in self.header if h[0] not in {t[0] for t in self.tensors}]
        return ascii((self.name, config, lost, tensors, header, sorted(self.then)))[:2000]

    def laid_out(self):
        at = 0
        for name, dtype, shape, data in self.tensors:
            offsets = [at, at + len(data)]
            self.header.append([name, {"dtype": dtype, "shape": shape, "data_offsets": offsets}])
            at = offsets[1]

    def packed(self):
        text = as_json(self.header).encode("utf-8", "surrogatepass")
        body = b"".join(t[3] for t in self.tensors)
        self.files = {
            CONFIG: bytearray(as_json(list(self.config.items())).encode()),
            TENSORS: bytearray(struct.pack("<Q", len(text)) + text + body),
        }


def tensors_of(folder):
    """The adapter's file, whatever the tool calls it."""
    others = (TENSORS, "base.safetensors", "merged.safetensors", "io.safetensors")
    found = [p for p in folder.glob("*.safetensors") if p.name not in others]
    return folder / TENSORS if (folder / TENSORS).exists() else found[0]


def as_json(items):
    """As json.dumps, of pairs, in which a key may be there twice."""
    return "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in items) + "}"


def write(w, folder):
    for name, data in w.files.items():
        (folder / name).write_bytes(data)
    for happens in w.then.values():
        happens(folder)
