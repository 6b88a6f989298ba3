"""One device or a pod: shardings, topologies, memory, forecasts."""

from lora_jax.parallel._forecast import Forecast, forecast
from lora_jax.parallel._hlo import Collective
from lora_jax.parallel._memory import Bytes, Memory, memory
from lora_jax.parallel._shardings import shardings
from lora_jax.parallel._state_shardings import state_shardings
from lora_jax.parallel._topology import topology_mesh

__all__ = [
    "shardings",
    "state_shardings",
    "topology_mesh",
    "memory",
    "Memory",
    "Bytes",
    "forecast",
    "Forecast",
    "Collective",
]
