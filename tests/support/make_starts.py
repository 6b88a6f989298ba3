"""Writes tests/data/peft_starts.npz: where PEFT's own EVA and LoftQ start.

    python tests/support/make_starts.py

Needs torch, peft 0.21.2 and bitsandbytes. `eva.*`: the inputs of each module, and its lora_A; the
ranks are redistributed. `loftq.*`: W, and Q, A and B after each number of iterations.
"""

import inspect
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent.parent / "data" / "peft_starts.npz"
# Of EVA's modules: features, and how much less each varies than the one before it.
WIDTHS, LESS = {"a": 8, "b": 6, "c": 5}, {"a": 0.9, "b": 0.5, "c": 0.3}
RANK, ITERATIONS = 2, (1, 3)


def eva():
    import peft
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, width in WIDTHS.items():
                setattr(self, name, torch.nn.Linear(width, 6))

        def forward(self, **x):
            return sum(getattr(self, name)(x[name]) for name in WIDTHS)

    torch.manual_seed(0)
    draw = lambda n, w: torch.randn(24, w) * LESS[n] ** torch.arange(w) + torch.randn(w)
    x = {n: draw(n, w) for n, w in WIDTHS.items()}
    exact = peft.EvaConfig(rho=2.0, tau=0.9999999)
    settings = dict(target_modules=list(WIDTHS), init_lora_weights="eva", eva_config=exact)
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=RANK, **settings))
    plain = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)
    peft.initialize_lora_eva_weights(model, [x], show_progress_bar=False, **plain)
    found = {n: m for n, m in model.base_model.model.named_children() if hasattr(m, "lora_A")}
    out = {f"eva.{n}.x": value for n, value in x.items()}
    return out | {f"eva.{n}.a": m.lora_A["default"].weight.detach() for n, m in found.items()}


def loftq():
    """PEFT asks for a GPU; all else of its function runs on a CPU as it is."""
    import torch
    from peft.utils import loftq_utils

    source = inspect.getsource(loftq_utils.loftq_init).replace('else "cuda"', 'else "cpu"')
    names = dict(vars(loftq_utils))
    exec(source, names)
    # A normal distribution has rows of few large numbers; (33, 64) is a block of 64 in each row.
    w = torch.from_numpy(np.random.default_rng(0).standard_normal((33, 64)).astype("f4") ** 3)
    out = {"loftq.w": w}
    for n in ITERATIONS:
        out |= zip([f"loftq.{n}.{k}" for k in "qab"], names["loftq_init"](w, 4, RANK, n))
    return out


if __name__ == "__main__":
    np.savez_compressed(FILE, **{k: np.asarray(v) for k, v in (eva() | loftq()).items()})
    print(FILE.name, FILE.stat().st_size, "bytes")
