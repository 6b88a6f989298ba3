"""The transform: from a function of parameters to one that understands adapted parameters."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lora_jax._core import compat, nnx, nnx_calls
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.numbers import check_flags
from lora_jax._interpret.coverage import Coverage, Use
from lora_jax._interpret.interpreter import Interpreter
from lora_jax._interpret.saving import has_own, policy
from lora_jax._interpret.stops import with_stops
from lora_jax._interpret.trace import Constants, Traceable
from lora_jax._nodes.stored import Stored, problems
from lora_jax._nodes.weight import AdaptedWeight, Coded, Followed, is_weight
from lora_jax._products.plan import AWARE, PLANS
from lora_jax._quantized.make import check_format


def adapt(
    fn: Callable,
    *,
    strict: bool = True,
    plan: str = "auto",
    save: str | Callable | None = None,
    merge_aware: str | None = None,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
) -> Callable:
    """Makes `fn` understand the adapted weights that `bind` puts into its arguments.

    The result takes the arguments of `fn`. Where they hold adapted weights, each contraction,
    convolution or look-up x·W becomes x·W + scale·(x·A)·B (arXiv:2106.09685, eq. 3); all else is
    `fn`, unchanged. A weight that `fn` returns as it got it is an array, W + scale·A·B. The result
    is a pure function, and composes with JAX's transformations. A `stop_gradient` around all uses
    of a weight is meant for the base, which is frozen anyway: the adapter still trains. Around some
    of them, as in a target network, it stops the adapter there, too. Without an adapted weight
    among the arguments it is `fn` itself.

    What `fn` changes of NNX objects among its arguments is changed as by `nnx.jit`.

    `fn` is traced as `jax.jit` would: arrays are traced, and every other leaf of the arguments
    (Python numbers, booleans, strings, functions) is a constant of the trace. Repeated calls with
    arrays of the same types and equal constants do not trace again.

    Args:
      fn: a function of arrays, such as `model.apply`.
      strict: raise if an adapted leaf is used anywhere but in low rank, or not at all. If False,
        such weights are materialised, W + scale·A·B, which is exact but forms a gradient of the
        size of W; `lora.coverage` lists them. So is a weight that enters a `jax.custom_jvp` or
        `jax.custom_vjp`, whose rule is for whole arrays; activations may.
      plan: how a matrix product is made. "factored": x·W + scale·(x·A)·B. "beside":
        [x, scale·x·A]·[W; B], one product, whose result is written once, and the like for the
        gradient of x; it copies x and W. "merged": x·(W + scale·A·B) in the forward pass and for
        the gradient of x; the merged weight is accumulated in fp32, rounded once to W's dtype,
        lives for one product and has no gradient. "auto" chooses by FLOPs and bytes, for each pass
        of each product. It merges only where nothing is rounded away: in fp32 or wider and, off
        the CPU, at the highest precision; it puts beside on GPUs; either on one device alone (or
        under shard_map), where shapes are known. Convolutions, ragged products and dropout are
        factored, and so is what "beside" is not for: sharding in types, operands of different
        types. `lora.coverage` shows the plan of each leaf.
      save: what the gradient keeps of the forward pass. None: whatever it needs; but in a `scan`
        over layers with DoRA, not the output after the gain beside the one before it, nor what
        activations and their gates are made of element by element. "products": results of
        products, of convolutions and of kernels that are not JAX's own; what is made of these
        element by element is made again, and so is (x·A)·B. Or a policy of
        `jax.checkpoint_policies`, of which `everything_saveable` overrules the default for DoRA. It
        is applied to each step of a `scan` over layers, or, where there is none, to `fn` as a
        whole. What has `jax.checkpoint` in it, or effects in order such as
        `jax.debug.print(ordered=True)`, is left as it is.
      merge_aware: a format of `lora.quant.quantize`, such as "nf4": each product is that with
        Q(W + scale·A·B), what the merged weight becomes in that format, so that
        `lora.merge(params, adapters, requantize=merge_aware)` is the function that was trained.
        The gradient of A and B passes straight through Q (arXiv:1308.3432): it is that of
        W + scale·A·B; that of x is through the weight that x met. One weight is there at a time,
        as in the plan "merged". On arrays, or on a base in codes: where that is of this format, an
        update shorter than half a step changes nothing (docs/howto/merge_aware.md). For products
        of matrices alone, of leaves that are moved on their way there.
      static_argnums, static_argnames: as in `jax.jit`, for arguments that hold arrays or objects
        and are still constants.

    Raises:
      LoRAError: an unknown plan or `save`; or "merged" with dropout, which is on the input of the
        branch; or `merge_aware` with an unknown format, another plan, or, when called, with
        dropout, DoRA, rows, some tokens alone, and leaves that are no matrix of floats, or are used
        by anything but a matrix product. When called, if strict: lists the leaves that were
        materialised (with the primitive and its source line) or unused. When called, if Variables
        of NNX are changed that are not arguments, or were made outside of the `jax` transform
        around the call.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 3))}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> apply = lora.adapt(lambda p, x: x @ p["w"])
    >>> loss = lambda adapters, x: jnp.sum(apply(lora.bind(params, adapters), x))
    >>> value, grads = jax.jit(jax.value_and_grad(loss))(adapters, jnp.ones((2, 4)))
    >>> value, grads["w"].a.shape, grads["w"].b.shape  # the base's loss: B is zero at the start
    (Array(24., dtype=float32), (4, 2), (2, 3))
    """
    call = Adapted(fn, strict, plan, save, merge_aware, static_argnums, static_argnames)

    @functools.wraps(fn, updated=())
    def adapted(*args: Any, **kwargs: Any) -> Any:
        return call(args, kwargs)

    return adapted


class Adapted(Traceable):
    """What `adapt` returns, of a tuple of arguments and a dict; see there.

    Attributes:
      part: the function may leave adapted leaves unused.
      made: the call of the user, for a message, up to its first option.
    """

    def __init__(
        self,
        fn: Callable,
        strict: bool,
        plan: str,
        save: str | Callable | None = None,
        merge_aware: str | None = None,
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
        *,
        part: bool = False,
        made: str = "lora.adapt(fn",
    ):
        super().__init__(fn, static_argnums, static_argnames, made.replace("(fn", "({fn}", 1) + ")")
        check_flags(f"{made}, strict=True)", strict=strict)
        self.part, self.made = part, made
        if plan not in PLANS:
            raise LoRAError(f'plan={plan!r} is not one of {", ".join(PLANS)}: {made}, plan="auto")')
        if not (save is None or save == "products" or callable(save)):
            raise LoRAError(
                f'save={save!r} is neither None, "products" nor a policy of '
                f'jax.checkpoint_policies: {made}, save="products")'
            )
        if merge_aware is not None and plan != "auto":
            raise LoRAError(
                f"plan={plan!r} with merge_aware={merge_aware!r}, which has a plan of its own: "
                f"{made}, merge_aware={merge_aware!r})"
            )
        wrong = merge_aware is not None and check_format(merge_aware, "merge_aware")
        if wrong:
            raise LoRAError(wrong)
        self.strict, self.plan, self.policy = strict, plan, policy(save)
        self.merge_aware = merge_aware

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        constants, arrays = self.split(args, kwargs)
        # A bound module is traced even where no weight in it is adapted: it shares Variables.
        if not any(map(is_weight, arrays)) and not nnx.is_bound((args, kwargs)):
            return self.fn(*args, **kwargs)
        if compat.intercepted():  # by what is no argument, and may do another thing each time
            self = copy.copy(self).keyed()
        try:
            # They are a static argument of make_jaxpr, which keys its cache by them.
            hash(constants)
        except TypeError as e:
            raise LoRAError(
                "a static argument, or one that is neither an array nor hashable, cannot be a "
                f"constant of the trace ({e}); pass arrays as they are, and what is no array by "
                "closure: lora.adapt(lambda p, x: fn(p, x, thing))"
            ) from None
        # Under an outer jit or scan the equations go straight into that trace.
        if compat.staging():
            out, changed = _transformed(self, constants, *arrays)
        else:
            # Executed at once, and always from one jaxpr: its loops are compiled by the first call.
            jaxpr, shapes = jax.make_jaxpr(self._transform, static_argnums=0, return_shape=True)(
                constants, *arrays
            )
            outs = compat.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(arrays))
            out, changed = jax.tree.unflatten(jax.tree.structure(shapes), outs)
        # What was traced were new objects; here the caller's own get the new values.
        nnx_calls.update((args, kwargs), changed)
        return out

    def keyed(self) -> Adapted:
        # One object for the lifetime of the transform: the cache of make_jaxpr is keyed by it.
        self._transform = functools.partial(_transformed, self)
        return super().keyed()

    def interpret(self, constants: Constants, arrays: Sequence) -> tuple[Any, Coverage, bool]:
        """The outputs with adapted weights, what became of each leaf, and whether what is kept is
        decided within: by the policy in the steps of a loop, or by `fn` itself."""
        jaxpr, shapes = self.jaxpr(constants, arrays)
        told = list(_told_apart(arrays))
        if self.plan == "merged" or self.merge_aware is not None:
            told = [x.settled() if isinstance(x, AdaptedWeight) else x for x in told]
        if self.merge_aware is not None:
            told = list(self._as_stored(told, self.merge_aware))
        # A base whose gradient is stopped has no tangent, so no gradient of its size is formed.
        # Without dead equations: a use that no output depends on is no use.
        program, consts = compat.live(jaxpr)
        frozen = with_stops(program, [_frozen(x) if is_weight(x) else x for x in told])
        adapted = [x for x in frozen if isinstance(x, AdaptedWeight)]
        apart = [x for x in adapted if x.apart] if self.plan == "merged" else []
        # x·(W + s·A·B) has no input of the branch alone that could be dropped.
        raise_all(
            'plan="merged" cannot drop inputs of the low-rank branch:',
            [
                f"'{x.origin}' "
                + (f"has dropout {x.dropout}" if x.drops else "is adapted token by token")
                for x in apart
            ],
            f'lora.bind(params, adapters) without a dropout_key, or {self.made}, plan="auto")',
        )
        plan = self.plan if self.merge_aware is None else AWARE
        interpreter = Interpreter(plan, self.policy)
        fixed = self.parameters(constants, arrays)
        outs = interpreter.run(program, consts, frozen, fixed=fixed)
        # Each rule returns a new object, so identity tells what `fn` returns as it got it.
        place = {id(x): i for i, x in enumerate(frozen)}
        as_array = lambda why: (
            lambda o: interpreter.returned(o, id(o) not in place, why) if is_weight(o) else o
        )
        # After what `fn` returns comes what it has written into NNX objects. A Variable that got
        # its own weight back, as from `nnx.remat`, keeps it.
        n = len(jax.tree.leaves(shapes[0]))
        changed = jax.tree.unflatten(jax.tree.structure(shapes[1]), outs[n:])
        if any(id(o) in place for o in outs[n:]):
            own = {id(x): i for i, x in enumerate(arrays)}
            same = lambda old, new: id(new) in place and place[id(new)] == own.get(id(old))
            changed = nnx_calls.without(changed, self.objects(constants, arrays)[1], same)
        returned = map(as_array("it is returned as an array"), outs[:n])
        out = jax.tree.unflatten(jax.tree.structure(shapes[0]), returned)
        written = as_array("the call writes it into an NNX object, as an array")
        changed = jax.tree.map(written, changed, is_leaf=is_weight)
        if self.merge_aware is not None:
            self._check_products(interpreter.events)
        # Codes without an adapter may be unused, and are no part of the coverage.
        leaves = {x.origin: x.shape for x in frozen if is_weight(x) and not isinstance(x, Coded)}
        coverage = Coverage.of(leaves, interpreter.events)
        return (out, changed), coverage, interpreter.saves or has_own(compat.opened(jaxpr)[0])

    def _as_stored(self, arrays: Sequence, format: str) -> Iterator:
        """The arrays, with each adapted weight on a base that is read as it will be stored."""
        adapted = [x for x in arrays if isinstance(x, AdaptedWeight)]
        raise_all(
            f"these leaves cannot be trained as they will be stored in {format!r}:",
            (p for x in adapted for p in problems(x)),
            f"{self.made}), without merge_aware, or adapters without these leaves",
        )
        for x in arrays:
            yield x.with_base(Stored.of(x, format)) if isinstance(x, AdaptedWeight) else x

    def _check_products(self, events: Mapping[tuple, Use]) -> None:
        """That each adapted leaf met its input as it will be stored, and nothing else."""
        raise_all(
            f"merge_aware={self.merge_aware!r} is for matrix products, of weights that are moved "
            "on their way:",
            (
                f"'{leaf}' is used by {use.primitive} ({use.source})"
                for (leaf, *_), use in events.items()
                if not use.plan.startswith(AWARE)
            ),
            f"{self.made}), without merge_aware, or adapters without these leaves",
        )


def _frozen(w: Followed) -> Followed:
    # vmap and scan slice arrays; `axes` is static, and stays as `bind` made it.
    if len(w.axes) != w.ndim:
        raise LoRAError(
            f"the adapted weight '{w.origin}' has {w.ndim} axes here and {len(w.axes)} where it "
            "was bound: it was sliced or batched outside of the adapted function. Adapt the "
            "function that holds the loop: lora.adapt(lambda params, x: jax.lax.scan(layer, x, "
            "params))"
        )
    return w.with_base(jax.lax.stop_gradient(w.base))


def _told_apart(arrays: Iterable) -> Iterator:
    """The arrays, with leaves of one path in two bound trees named differently."""
    seen: collections.Counter = collections.Counter()
    for x in arrays:
        if is_weight(x):
            seen[x.origin] += 1
            if seen[x.origin] > 1:
                x = dataclasses.replace(x, origin=f"{x.origin} (tree {seen[x.origin]})")
        yield x


def _transformed(adapted: Adapted, constants: Constants, *arrays: Any) -> Any:
    if adapted.policy is None:
        out, coverage, _ = adapted.interpret(constants, arrays)
    else:
        found: list = []

        def fn(*xs: Any) -> Any:
            out, *rest = adapted.interpret(constants, xs)
            found.append(rest)
            return out

        # Traced once, before it is known whether a loop over layers has the policy within it.
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*arrays)
        ((coverage, saves),) = found
        run = compat.jaxpr_as_fun(jaxpr)
        outs = (run if saves else jax.checkpoint(run, policy=adapted.policy))(
            *jax.tree.leaves(arrays)
        )
        out = jax.tree.unflatten(jax.tree.structure(shapes), outs)
    if adapted.strict:
        name = getattr(adapted.fn, "__name__", repr(adapted.fn))
        coverage.check(name, f"{adapted.made}, strict=False)", adapted.part)
    return out


def coverage(
    fn: Callable,
    *args: Any,
    plan: str = "auto",
    merge_aware: str | None = None,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    **kwargs: Any,
) -> Coverage:
    """What `adapt(fn)(*args, **kwargs)` does with each adapted leaf, without computing anything.

    Args:
      fn: the plain function, not an adapted one.
      plan, merge_aware, static_argnums, static_argnames: as in `adapt`.
      *args, **kwargs: its arguments, with bound parameters; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A `Coverage`: print it, or ask it for `low_rank`, `materialised` and `unused` paths.

    Raises:
      LoRAError: as `adapt` and its result, but for leaves that are materialised or unused.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 3))}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> fn = lambda p, x: x @ p["w"]
    >>> lora.coverage(fn, lora.bind(params, adapters), jnp.ones((2, 4))).low_rank
    ('w',)
    """
    options = (False, plan, None, merge_aware, static_argnums, static_argnames)
    call = Adapted(fn, *options, made="lora.coverage(fn, bound, x")
    constants, arrays = call.split(args, kwargs)
    found = []
    # A coverage is no array: it leaves the trace by this list.
    jax.eval_shape(lambda xs: found.append(call.interpret(constants, xs)[1]), arrays)
    return found[0]
