"""What makes a quantised base."""

from lora_jax._quantized.weight import Quantized
from lora_jax.quant._bitsandbytes import bitsandbytes_weight
from lora_jax.quant._gathered import gathered
from lora_jax.quant._gguf import gguf_weight
from lora_jax.quant._loftq import loftq
from lora_jax.quant._quantize import dequantize, errors, quantize
from lora_jax.quant._qwix import from_qwix

__all__ = [
    "quantize",
    "dequantize",
    "errors",
    "loftq",
    "gguf_weight",
    "bitsandbytes_weight",
    "from_qwix",
    "gathered",
    "Quantized",
]
