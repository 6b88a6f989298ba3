"""The same models in torch, for the test that PEFT loads what we write."""

import golden_models as g
import numpy as np
import torch
from make_golden import GOLDEN
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb, self.lin = nn.Embedding(11, 8), nn.Linear(8, 12)
        self.c1d, self.head = Conv1D(10, 12), nn.Linear(10, 6)

    def forward(self, x):
        return self.head(torch.relu(self.c1d(torch.relu(self.lin(self.emb(x))))))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pw = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.cv1 = nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, x):
        h = torch.relu(self.pw(torch.relu(self.conv(x))))
        return self.cv1(h.flatten(2))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 5, 8))
        self.down_proj = nn.Parameter(torch.zeros(3, 8, 5))

    def forward(self, x):
        h = torch.einsum("bi,eoi->beo", x, self.gate_up_proj)
        return torch.einsum("beo,eio->bi", torch.relu(h), self.down_proj)


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.out = Experts(), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.experts(x))


class Mha(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.attn(x, x, x, need_weights=False)[0])


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


MODELS = {"llama": llama, "gpt2": gpt2, "net": Net, "conv": ConvNet, "moe": Moe, "mha": Mha}


def based(name):
    """The torch model with its base weights, in their type."""
    weights = {k: as_torch(v) for k, v in g.base(name).items()}
    make = KINDS[GOLDEN[name][0]] if name in GOLDEN else MODELS[name.partition("_")[0]]
    model = make().to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model


def as_torch(array):
    if array.dtype == "bfloat16":  # which torch does not take from numpy
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def output(name, folder, x, save=None):
    """What PEFT gives for the adapter in `folder`, which it also writes to `save`."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(based(name), folder).eval()
    if save is not None:
        model.save_pretrained(save)
    x = torch.from_numpy(np.array(x))
    with torch.no_grad():
        y = model(x.long() if x.dtype == torch.int32 else x)
    return getattr(y, "logits", y).float().numpy()


def written(name, folder, x, config):
    """Has PEFT write an adapter of random values; returns what it gives."""
    import peft

    torch.manual_seed(0)
    model = based(name)
    kind = peft.AdaLoraConfig if "init_r" in config else peft.LoraConfig
    model = peft.get_peft_model(model, kind(**config)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in key and "original_module" not in key:
                p.add_(0.2 * torch.randn_like(p))
        y = model(torch.from_numpy(np.array(x)).long() if name.startswith(("net", "ll")) else x)
    model.save_pretrained(folder)
    return getattr(y, "logits", y).numpy()


# The kinds that tests/support/make_golden.py writes


class Convs(nn.Module):
    """Stride, padding, several window sizes, and one position."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.b, self.c = nn.Conv2d(6, 4, 1), nn.Conv1d(4, 5, 3, stride=2, padding=2)
        self.d = nn.Conv3d(5, 4, (2, 1, 3), padding=(1, 0, 1), bias=False)

    def forward(self, x):
        h = torch.relu(self.b(torch.relu(self.a(x))))
        h = torch.relu(self.c(h.flatten(2)))[:, :, :12]
        return self.d(h.reshape(h.shape[0], 5, 2, 2, 3))


class GatedExperts(nn.Module):
    """gate_up_proj (3, 5, 8) and down_proj (3, 4, 5) as (experts, in, out), or turned."""

    def __init__(self, turned):
        super().__init__()
        shape = (lambda i, o: (3, o, i)) if turned else (lambda i, o: (3, i, o))
        self.turned = turned
        self.gate_up_proj = nn.Parameter(torch.randn(shape(5, 8)) * 0.4)
        self.down_proj = nn.Parameter(torch.randn(shape(4, 5)) * 0.4)

    def forward(self, x):
        axes = "eoi" if self.turned else "eio"
        gate, up = torch.einsum(f"bi,{axes}->beo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum(f"bei,{axes}->bo", torch.relu(gate) * up, self.down_proj)


class Gated(nn.Module):
    def __init__(self, turned=False, is_transposed=None):
        super().__init__()
        self.experts, self.out = GatedExperts(turned), nn.Linear(5, 4)
        if is_transposed is not None:
            self.experts.is_transposed = is_transposed

    def forward(self, x):
        return self.out(self.experts(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.dense(x))))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.classifier = nn.Embedding(11, 8), nn.Linear(8, 12), Head()

    def forward(self, x):
        return self.classifier(torch.relu(self.lin(self.emb(x))))


class Mixed(nn.Module):
    """Convolutions and products, each wider than the ranks of most adapters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.lin, self.out = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x):
        h = torch.relu(self.b(torch.relu(self.a(x))))
        return self.out(torch.relu(self.lin(h.flatten(2).mean(2))))


def small_llama(tied, layers=1):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": layers,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1)
    return model


def small_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1)
    return model


KINDS = {
    "convs": Convs,
    "gated_plain": Gated,
    "gated_flagged": lambda: Gated(is_transposed=True),
    "gated_turned": lambda: Gated(turned=True),
    "classifier": Classifier,
    "mixed": Mixed,
    "mha": Mha,
    "net": Net,
    "tied": lambda: small_llama(True),
    "untied": lambda: small_llama(False),
    "two_layers": lambda: small_llama(False, layers=2),
    "gpt2": small_gpt2,
}
INPUTS = {"convs": (2, 3, 8, 8), "gated": (4, 5), "mha": (2, 3, 8)}


def kind_input(kind):
    torch.manual_seed(1)
    shape = INPUTS.get(kind.partition("_")[0])
    return torch.randn(shape) if shape else torch.randint(0, 11, (2, 5))


def write_kind(kind, folder, settings, prune=False):
    """Has PEFT adapt a model with random values; writes a golden folder, returns (model, output)."""
    import peft
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model, x = KINDS[kind]().eval(), kind_input(kind)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    y_base = logits(model, x)
    make = peft.AdaLoraConfig if "init_r" in settings else peft.LoraConfig
    model = peft.get_peft_model(model, make(**settings)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in key and "original_module" not in key:
                p.add_(0.2 * torch.randn_like(p))
    for step in range(1, settings.get("total_step", 0) if prune else 0):
        (model(x) ** 2).sum().backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    y = logits(model, x)
    model.save_pretrained(folder)
    save_file(base, folder / "base.safetensors")
    save_file({"in_x": x, "y_base": y_base, "y_adapter": y}, folder / "io.safetensors")
    (folder / "README.md").unlink(missing_ok=True)


def kind_output(kind, folder):
    """What PEFT gives for the adapter in `folder`."""
    from peft import PeftModel

    torch.manual_seed(0)
    return logits(PeftModel.from_pretrained(KINDS[kind](), folder).eval(), kind_input(kind)).numpy()


def logits(model, x):
    with torch.no_grad():
        y = model(x)
    return getattr(y, "logits", y)
