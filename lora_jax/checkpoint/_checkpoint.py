"""Checkpoints of a training run: adapters, optimiser state and what they belong to, by orbax.

Orbax writes and reads the arrays, asynchronously and sharded; its manager decides when to save and
what to keep. Here stands what makes a checkpoint safe to read: a description beside the arrays (the
format, the configuration, the base's fingerprint, a checksum of each array), compared before
anything is restored. The base itself is not in it.

On disk, in a step's directory: `adapters/` and `state/` (orbax), `lora/` (JSON).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import types
from collections.abc import Generator, Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from lora_jax._bind import adapter_nodes
from lora_jax._config import LoRAConfig
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.node import is_node
from lora_jax._targets import Targets
from lora_jax.checkpoint._arguments import (
    as_json,
    numbers,
    refuse_a_manager_that_cannot_write,
    refuse_a_train_state,
    refuse_variables,
    step_number,
)
from lora_jax.checkpoint._describe import (
    adapters_to_json,
    another_config,
    as_config,
    config_from_json,
    config_to_json,
    nodes_from_json,
    other_config,
)
from lora_jax.checkpoint._directory import FORMAT, arrays_of, crc32, description, opened, ours
from lora_jax.checkpoint._fingerprint import Fingerprint, fingerprint, taken_once
from lora_jax.checkpoint._grow import config_of, growing, kept, with_scales
from lora_jax.checkpoint._records import (
    abstract,
    differences,
    other_nodes,
    placement,
    rebuilt,
    recorded,
)
from lora_jax.checkpoint._run import claim
from lora_jax.parallel._shardings import shardings
from lora_jax.parallel._state_shardings import state_shardings

SAVE = "lora.checkpoint.save(manager, step, adapters, base=params, config=config, state=opt_state)"
SAVE_OF = "lora.checkpoint.save(manager, step, {adapters}, base={params})"
RESTORE = "lora.checkpoint.restore(manager, adapters, base=params, config=config, state=opt_state)"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found.

    Attributes:
      step: the step of the checkpoint.
      adapters, state: the trees, placed as was asked; `state` is None where it was not asked for.
      data: what was saved as `data`, as JSON gives it back.
      metrics: what was saved as `metrics`, or None.
      config: the configuration that was saved; None if there was none, or if a function (a
        predicate, an initialiser) is part of it. After growing: the one of the grown adapters.
      base: the fingerprint of the base.

    >>> import jax.numpy as jnp, lora_jax as lora, orbax.checkpoint as ocp, tempfile
    >>> base, adapters = {"bias": jnp.zeros(2)}, {"bias": lora.Full(jnp.ones(2))}
    >>> folder = tempfile.mkdtemp()
    >>> with ocp.CheckpointManager(folder) as manager:
    ...     lora.checkpoint.save(manager, 7, adapters, base=base, data={"epoch": 1})
    True
    >>> found = lora.checkpoint.restore(folder, base=base)
    >>> found.step, found.data, found.adapters["bias"].value
    (7, {'epoch': 1}, Array([1., 1.], dtype=float32))
    """

    step: int
    adapters: Any
    state: Any
    data: Any
    metrics: Mapping[str, float] | None
    config: LoRAConfig | None
    base: Fingerprint


def save(
    manager: ocp.CheckpointManager,
    step: int,
    adapters: Any,
    *,
    base: Any,
    config: LoRAConfig | Targets | None = None,
    state: Any = None,
    data: Any = None,
    metrics: Mapping[str, float] | None = None,
    force: bool = False,
) -> bool:
    """Saves a step of a training run, if it is the manager's time to.

    The arrays are copied before it returns, so that the step may donate them; the files are written
    in the background, and count as a checkpoint once they are complete. Several processes call it
    together, with the same values; each writes its own shards.

    Args:
      manager: orbax's, with its own options: `ocp.CheckpointManager(directory,
        options=ocp.CheckpointManagerOptions(max_to_keep=3, save_interval_steps=100))`.
      step: the number of steps done.
      adapters: the adapters.
      base: the base parameters, or a `fingerprint` of them. They are not saved, only what tells
        them from others: paths, shapes, types and, unless it is left out of the fingerprint, a
        checksum of each leaf. That reads each parameter once a run, as long as the same arrays are
        passed (for what it takes, and to turn it off, see `fingerprint`).
      config: the configuration, or the `Targets` made of it.
      state: any tree of arrays, keys (typed or not), numbers and strings: the optimiser's state,
        the random key, an average of the adapters.
      data: the position in the data, or anything else that JSON can hold.
      metrics: numbers, also for the manager's `best_fn`.
      force: save although the manager's interval says otherwise.

    Returns:
      Whether it was saved; it was not if the manager's interval says so (orbax always saves the
      first step in an empty directory), or if the same values are there as this step already.

    Raises:
      LoRAError: the step, or a later one, is there already; the directory holds checkpoints of
        something else, or the manager is closed or only reads, or another run saves to it
        (docs/howto/checkpoint.md says on which file systems that is found); the adapters are not of
        this base or configuration; `data` is not JSON, `metrics` are not numbers, or a leaf of
        `state` cannot be saved. Nothing is written then. Or what is written, or was before, did not
        get to the disk.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, orbax.checkpoint as ocp, tempfile
    >>> params = {"q": jnp.ones((8, 8))}
    >>> config = lora.LoRAConfig(rank=2, targets="q")
    >>> adapters = lora.init(jax.random.key(0), params, config)
    >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
    ...     saved = dict(base=params, config=config, data={"epoch": 1})
    ...     lora.checkpoint.save(manager, 100, adapters, **saved)
    ...     manager.wait_until_finished()
    ...     lora.checkpoint.restore(manager, adapters, base=params, config=config).data
    True
    {'epoch': 1}
    """
    if not isinstance(manager, ocp.CheckpointManager):
        raise LoRAError(
            f"expected an orbax CheckpointManager, found {type(manager).__name__}: "
            f"manager = ocp.CheckpointManager(directory); {SAVE}"
        )
    refuse_a_manager_that_cannot_write(manager)
    step = step_number(step)
    metrics = numbers(metrics)
    refuse_a_train_state(adapters, SAVE)
    # Without values: every call is checked, and few of them save.
    shapes = base if isinstance(base, Fingerprint) else fingerprint(base, content=False)
    refuse_variables(shapes, flatten(adapters, is_leaf=is_node))
    if not shapes.leaves:
        raise LoRAError(f"expected parameters as the base, found a {type(base).__name__}: {SAVE}")
    leaves = {p: types.SimpleNamespace(shape=shape) for p, (shape, _) in shapes.leaves.items()}
    adapter_nodes(leaves, adapters, SAVE_OF)
    if config is not None:
        raise_all(
            "the configuration is not that of these adapters:",
            another_config(as_config(config), adapters),
            "pass the one that made them, or config=None",
        )
    latest = manager.latest_step()
    # A step that is not after the latest goes on: below it is the same one again, or an error.
    if (latest is None or step > latest) and not (force or manager.should_save(step)):
        return False
    # Orbax would wait as well; what went wrong in the background is raised here.
    with _written(f"the save before step {step}"):
        manager.wait_until_finished()
    # Other processes may have saved since.
    manager.reload()
    latest = manager.latest_step()
    if latest is not None and not ours(manager, latest):
        raise LoRAError(
            f"{manager.directory} holds checkpoints of something else, or a damaged one (step "
            f"{latest}), which the manager would remove in time; nothing was saved. Use another "
            "directory, or manager.delete(step)"
        )
    # From here on it is to be saved, and the values are read: once for a manager.
    base = base if isinstance(base, Fingerprint) else taken_once(manager, base)
    record: dict = {
        "format": FORMAT,
        "step": step,
        "config": None if config is None else config_to_json(as_config(config)),
        "base": {p: [dtype, list(shape)] for p, (shape, dtype) in base.leaves.items()},
        "content": base.content and dict(base.content),
        "nodes": adapters_to_json(adapters),
        "data": as_json(data),
        "metrics": metrics,
    }
    items = {}
    for name, tree in {"adapters": adapters, "state": state}.items():
        record[name], arrays = recorded(tree, name)
        # Orbax refuses an item without arrays; its entries are in the record.
        if arrays:
            items[name] = ocp.args.StandardSave(arrays)
    record["crc32"] = crc32(record)
    if latest is not None and step <= latest:
        # The record has a checksum of each array: one number compares it all.
        if step == latest and description(manager, step)[1]["crc32"] == record["crc32"]:
            return False
        raise LoRAError(
            f"step {step} is not after the latest in {manager.directory}, {latest}; nothing was "
            "saved. To go back, remove what comes after, manager.delete(step), or use another "
            "directory"
        )
    # Last, when nothing that can be known beforehand speaks against it.
    claim(manager, step)
    args = ocp.args.Composite(lora=ocp.args.JsonSave(record), **items)
    with _written(f"step {step}"):
        return manager.save(step, args=args, metrics=metrics, force=force)


@contextlib.contextmanager
def _written(what: str) -> Generator[None, None, None]:
    """One error for whatever the file system, tensorstore or orbax raise as they write."""
    try:
        yield
    except Exception as e:
        raise LoRAError(
            f"{what} could not be written, {type(e).__name__}: {e}. The steps that were complete "
            "are; make room, or use another directory, and save again"
        ) from e


def restore(
    manager: ocp.CheckpointManager | str | os.PathLike,
    adapters: Any = None,
    *,
    base: Any,
    config: LoRAConfig | Targets | None = None,
    state: Any = None,
    step: int | None = None,
    rank: Literal["exact", "grow"] = "exact",
) -> Restored:
    """Reads a checkpoint back, after comparing it with what is asked for.

    Arrays go where the trees that are passed say, whatever mesh and number of processes wrote them;
    their values are checked against the checksums that were saved.

    Args:
      manager: orbax's manager, or the directory.
      adapters: adapters like those that were saved: arrays, or `jax.ShapeDtypeStruct`s with
        shardings. None: as the checkpoint describes them, sharded as the base is.
      base: the base parameters or a `fingerprint` of them; None, explicitly, does not compare. The
        values are compared, by their checksums, where those were saved; shapes, or a fingerprint
        with content=False, leave that out.
      config: is compared, if passed, with the one that was saved.
      state: a tree like the one that was saved, such as `tx.init(adapters)`, arrays or shapes; None
        reads the adapters alone.
      step: which; the latest if None.
      rank: "grow" reads adapters of smaller rank into the `adapters` that are passed: the product
        A·B and the scale stay those of the checkpoint, and the `config` that is returned has the
        alpha that this takes, scale · rank. The new part of one factor is zero, that of the other
        as passed, so that it can learn; new entries of the moments in `state` are zero.

    Returns:
      A `Restored`.

    Raises:
      LoRAError: there is no checkpoint, it is not of this library, of a newer format, or damaged;
        or its base, configuration, adapters or state are others: the differences are listed. A
        state is compared by its leaves: that of another optimiser with the same leaves passes.
        Nothing is changed on disk.

    >>> import jax.numpy as jnp, lora_jax as lora, orbax.checkpoint as ocp, tempfile
    >>> base, folder = {"q": jnp.zeros((4, 3))}, tempfile.mkdtemp()
    >>> geometry = lora.Geometry((0,), (1,))
    >>> node = lambda a, b: lora.LoRA(a, b, 1.0, geometry)
    >>> adapters = {"q": node(jnp.ones((4, 1)), jnp.ones((1, 3)))}
    >>> with ocp.CheckpointManager(folder) as manager:
    ...     lora.checkpoint.save(manager, 100, adapters, base=base)
    True
    >>> lora.checkpoint.restore(folder, base=base).adapters["q"].rank
    1
    >>> larger = {"q": node(jnp.ones((4, 2)), jnp.zeros((2, 3)))}
    >>> lora.checkpoint.restore(folder, larger, base=base, rank="grow").adapters["q"].b
    Array([[1., 1., 1.],
           [0., 0., 0.]], dtype=float32)
    """
    if rank not in ("exact", "grow"):
        raise LoRAError(f"rank={rank!r}: expected 'exact' or 'grow'")
    if rank == "grow" and adapters is None:
        raise LoRAError("rank='grow' needs the larger adapters: lora.init(key, params, config)")
    refuse_a_train_state(adapters, RESTORE)
    with opened(manager) as manager:
        step, record = description(manager, None if step is None else step_number(step))
        where = f"checkpoint {step} in {manager.directory}"
        # Shapes and static fields alone; no array is read before all of it is compared.
        saved = nodes_from_json(record["nodes"], adapters, where)
        if adapters is None:
            adapters = _placed_as(saved, base)
        likes = {"adapters": adapters}
        if state is not None:
            likes["state"] = _beside(state, adapters)
        # {array: (its adapter, the axis that grows)}, of the adapters and of their moments.
        larger = {n: growing(t, saved) if rank == "grow" else {} for n, t in likes.items()}
        owners = {owner for owner, _ in larger["adapters"].values()}
        keep, unfit = kept(adapters, saved, owners)
        others = other_nodes(record["nodes"], adapters, owners) + unfit
        failures = _other_base(record, base) + other_config(record, config, rank == "grow")
        for name, tree in likes.items():
            axes = {p: axis for p, (_, axis) in larger[name].items()}
            # `others` has a line for each adapter of another shape; each array need not say it too.
            axes = None if name == "adapters" or others else axes
            failures += differences(record[name], tree, name, axes)
        raise_all(f"{where} is of something else:", failures + others, RESTORE)
        found: dict[str, Any] = {}
        for name, tree in likes.items():
            arrays = arrays_of(manager, step, name, abstract(record[name], tree))
            # The new part is as passed in the factor that was drawn, and zero in the other one and
            # in all moments.
            drawn = keep if name == "adapters" else ()
            of = {p: (axis, p in drawn) for p, (_, axis) in larger[name].items()}
            found[name] = rebuilt(record[name], tree, arrays, of, where)
    own = record["config"] and config_from_json(record["config"])
    if rank == "grow":
        found = {name: with_scales(tree, saved) for name, tree in found.items()}
        own = own if config is None else as_config(config)
        own = own and config_of(own, found["adapters"])
    return Restored(
        step=step,
        adapters=found["adapters"],
        state=found.get("state"),
        data=record["data"],
        metrics=record["metrics"],
        config=own,
        base=_fingerprint(record),
    )


def _placed_as(saved: Mapping[str, Any], base: Any) -> Any:
    """Shapes of the adapters {path: node}, as a tree, sharded as the base where it says how."""
    tree = nest(saved)
    if base is None or isinstance(base, Fingerprint):
        return tree
    leaves = flatten(state_of(base))
    own = {p: placement(leaves[p]) for p in saved if p in leaves}
    if all(where is None for where in own.values()):
        return tree
    raise_all(
        "these leaves of the base are on no device in particular, and others are placed:",
        (f"'{p}'" for p, where in own.items() if where is None),
        "place all of them, jax.device_put(params, shardings), or pass adapters that are placed",
    )
    # The base is another one, as `restore` is about to say.
    if own.keys() != saved.keys():
        return tree
    return _at(tree, shardings(nest(own), tree))


def _beside(state: Any, adapters: Any) -> Any:
    """The state; its shapes without a sharding get the one that the adapters' shardings imply."""
    placed = [isinstance(placement(x), NamedSharding) for x in jax.tree.leaves(adapters)]
    nowhere = lambda x: isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None
    # What the caller has placed stays there; a fresh `eval_shape` of a state says nothing.
    if not placed or not all(placed) or not any(map(nowhere, jax.tree.leaves(state))):
        return state
    at = state_shardings(state, adapters, jax.tree.map(placement, adapters))
    return jax.tree.map(lambda x, s: _at(x, s) if nowhere(x) else x, state, at)


def _at(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _fingerprint(record: Mapping) -> Fingerprint:
    leaves = {p: (tuple(shape), dtype) for p, (dtype, shape) in record["base"].items()}
    return Fingerprint(leaves, record["content"])


def _other_base(record: Mapping, base: Any) -> list[str]:
    if base is None:
        return []
    if not isinstance(base, Fingerprint):
        # The values are read only where there is something to compare them with.
        base = fingerprint(base, content=None if record["content"] else False)
    refuse_variables(base, record["base"])
    return [f"base: {line}" for line in _fingerprint(record).differences(base)]
