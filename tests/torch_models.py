"""The same models in torch, for the test that PEFT loads what we write."""

import golden_models as g
import numpy as np
import torch
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


def output(name, folder, x):
    """What PEFT gives for the adapter in `folder`."""
    from peft import PeftModel

    model = MODELS[name.partition("_")[0]]()
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in g.base(name).items()})
    model = PeftModel.from_pretrained(model, folder).eval()
    x = torch.from_numpy(np.array(x))
    with torch.no_grad():
        y = model(x.long() if x.dtype == torch.int32 else x)
    return getattr(y, "logits", y).numpy()


def written(name, folder, x, config):
    """Has PEFT write an adapter of random values; returns what it gives."""
    import peft

    torch.manual_seed(0)
    model = MODELS[name.partition("_")[0]]()
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in g.base(name).items()})
    kind = peft.AdaLoraConfig if "init_r" in config else peft.LoraConfig
    model = peft.get_peft_model(model, kind(**config)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in key and "original_module" not in key:
                p.add_(0.2 * torch.randn_like(p))
        y = model(torch.from_numpy(np.array(x)).long() if name.startswith(("net", "ll")) else x)
    model.save_pretrained(folder)
    return getattr(y, "logits", y).numpy()
