"""What a step takes on each device, as the compiled program says: on simulated devices, and, with
the real compilers, on TPUs and GPUs that are not there."""

import functools
import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import pod
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.parallel._forecast import _out_of_memory
from lora_jax.parallel._hlo import collectives, nbytes

P = PartitionSpec
size = jax.ShapeDtypeStruct


@pytest.fixture
def mesh():
    return Mesh(jax.devices(), "data")


def on(mesh, shape, spec, dtype="float32"):
    return size(shape, dtype, sharding=NamedSharding(mesh, spec))


def local_bytes(tree):
    """Bytes of the shards of one device."""
    shard = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(shard, jax.tree.leaves(tree)))


def test_the_sizes_are_those_of_one_shard(mesh):
    x, y = on(mesh, (64, 32), P("data")), on(mesh, (32, 16), P())
    plan = lora.parallel.forecast(lambda x, y: x @ y, x, y, out_shardings=x.sharding)
    assert plan.devices == 8
    assert plan.arguments == local_bytes((x, y)) == 8 * 32 * 4 + 32 * 16 * 4
    assert plan.outputs == 8 * 16 * 4
    assert plan.aliased == 0
    assert plan.peak == plan.arguments + plan.outputs + plan.temporaries
    assert plan.flops == 2 * 8 * 32 * 16
    assert plan.capacity is None and plan.fits is None


DEVICES_OF = {  # functions that say themselves where they run, of arguments that do not
    "in_shardings": lambda mesh, fn: jax.jit(fn, in_shardings=NamedSharding(mesh, P("data"))),
    "jit inside": lambda mesh, fn: lambda x: DEVICES_OF["in_shardings"](mesh, fn)(x),
    "constraint": lambda mesh, fn: lambda x: fn(
        jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))
    ),
    "shard_map": lambda mesh, fn: jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P("data")),
    "pmap": lambda mesh, fn: jax.pmap(fn, devices=list(mesh.devices.flat)),
    "nnx.jit": lambda mesh, fn: nnx.jit(fn, in_shardings=NamedSharding(mesh, P("data"))),
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("name", DEVICES_OF)
def test_devices_of_the_function(name, n):
    """They are counted where its arguments say nothing: as many, and with the sizes of a shard."""
    fn = DEVICES_OF[name](Mesh(jax.devices()[:n], "data"), lambda x: x * 2)
    shape = (n, 8, 4) if name == "pmap" else (n * 8, 4)
    given = jnp.ones(shape) if name == "nnx.jit" else size(shape, "float32")
    plan = lora.parallel.forecast(fn, given)
    assert plan.devices == n
    assert plan.outputs == 8 * 4 * 4


def test_donated_arguments_are_counted_once(mesh):
    x = on(mesh, (64, 32), P("data"))
    plan = lora.parallel.forecast(lambda x: x + 1, x, donate_argnums=0, out_shardings=x.sharding)
    assert plan.aliased == plan.outputs == plan.arguments == local_bytes(x)
    assert plan.peak == plan.arguments + plan.temporaries
    assert lora.parallel.forecast(
        jax.jit(lambda x: x + 1, donate_argnums=0), x
    ).aliased == local_bytes(x)


def test_nothing_is_executed(mesh):
    def fn(x):
        jax.debug.callback(lambda: pytest.fail("executed"))
        return x + 1

    lora.parallel.forecast(fn, on(mesh, (8,), P("data")))


def test_a_collective_is_counted_with_its_bytes(mesh):
    x = on(mesh, (8, 1000), P("data"))
    everywhere = NamedSharding(mesh, P())
    (c,) = lora.parallel.forecast(lambda x: x.sum(0), x, out_shardings=everywhere).collectives
    assert (c.kind, c.bytes, c.count, c.times) == ("all-reduce", 4000, 1, 1)
    (c,) = lora.parallel.forecast(lambda x: x + 1, x, out_shardings=everywhere).collectives
    assert (c.kind, c.array, c.bytes) == ("all-gather", "f32[8,1000]", 32000)


def psum_in(loop):
    """A psum of a row of 16 numbers for each of 5 x 3 turns, in a shard_map."""

    def body(x):
        turn = lambda x: jax.lax.pcast(jax.lax.psum(jnp.sin(x), "data"), "data", to="varying")
        return loop(lambda x: loop(turn, x, 3), x, 5)

    return body


def scan(f, x, n):
    return jax.lax.scan(lambda x, _: (f(x), None), x, length=n)[0]


def fori(f, x, n):
    return jax.lax.fori_loop(2, n + 2, lambda _, x: f(x), x)


def until_small(f, x, n):
    return jax.lax.while_loop(lambda x: jnp.sum(x) > n, f, x)


@pytest.mark.parametrize("loop,times", [(scan, 15), (fori, 15), (until_small, None)])
def test_collectives_in_loops_are_counted_by_their_trips(mesh, loop, times):
    f = jax.shard_map(psum_in(loop), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    plan = lora.parallel.forecast(f, on(mesh, (8, 16), P("data")))
    (c,) = [c for c in plan.collectives if c.bytes == 64]
    assert (c.kind, c.count, c.times) == ("all-reduce", 1, times)
    assert plan.collective_bytes == (None if times is None else 15 * 64)


@pytest.mark.parametrize(
    "array,want",
    [
        ("f32[2,3]", 24),
        ("bf16[8]", 16),
        ("f16[]", 2),
        ("f8e4m3fn[16]", 16),
        ("s8[3]", 3),
        ("pred[5]", 5),
        ("u64[2]", 16),
        ("c64[2]", 16),
        ("s4[3]", 2),
        ("token[]", 0),
        ("f32[0,4]", 0),
    ],
)
def test_widths(array, want):
    assert nbytes(array) == want


# What the other compilers write: a TPU loop without a note of its trips, one collective in the
# fusions that it spans, in several loops, an all-reduce that is scattered; a GPU's pairs of start and done.
TPU = """HloModule jit_step
%fused.1 (p: bf16[8,128]) -> (bf16[8,128], bf16[16,128]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
  ROOT %start = (bf16[8,128], bf16[16,128]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}
%fused.2 (p2: bf16[8,128]) -> (bf16[8,128], bf16[16,128]) {
  %p2 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.2 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p2), channel_id=3, dimensions={0}
}
%all-reduce-scatter.1 (p3: bf16[4,256]) -> bf16[4,64] {
  %p3 = bf16[4,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[4,256]{1,0} all-reduce(%p3), channel_id=4, to_apply=%add
  ROOT %slice = bf16[4,64]{1,0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={4,64}
}
%test (s: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  %s = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %bound), direction=LT
}
%body (b: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %b = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0}) parameter(0)
  %one = s32[]{:T(128)} constant(STEP)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%b), index=1
  %f1 = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) fusion(%x), kind=kCustom, calls=%fused.1
  %f2 = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) fusion(%x), kind=kCustom, calls=%fused.2
  %f3 = bf16[4,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%next, %x)
}
ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(START)
  %copied = s32[]{:T(128)} copy(%zero)
  %in = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%copied, %a)
  %while = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%in), condition=%test, body=%body
  %f4 = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) fusion(%a), kind=kCustom, calls=%fused.2
}
"""
GPU = """HloModule jit_step
%async (q: f32[64]) -> f32[8] {
  %q = f32[64]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[8]{0} reduce-scatter(%q), channel_id=9, dimensions={0}
}
ENTRY %main (a: f32[8,4], b: f32[64]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %s1 = ((f32[8,4]{1,0}, f32[64]{0}), (f32[16,4]{1,0}, f32[128]{0})) all-gather-start(%a, %b), channel_id=1
  %d1 = (f32[16,4]{1,0}, f32[128]{0}) all-gather-done(%s1)
  %s2 = (f32[8,4]{1,0}, f32[64]{0}) all-reduce-start(%a, %b), channel_id=2, to_apply=%add
  %d2 = (f32[8,4]{1,0}, f32[64]{0}) all-reduce-done(%s2)
  %s3 = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=5
  %d3 = f32[8,4]{1,0} collective-permute-done(%s3)
  %s4 = ((f32[64]{0}), f32[8]{0}) async-start(%b), calls=%async
  ROOT %d4 = f32[8]{0} async-done(%s4), calls=%async
}
"""


def test_a_tpu_program():
    one_by_one = TPU.replace("START", "0").replace("STEP", "1")
    found = [(c.kind, c.array, c.bytes, c.count, c.times) for c in collectives(one_by_one)]
    assert found == [
        ("all-gather", "bf16[16,128]", 4096, 1, 32),
        ("reduce-scatter", "bf16[4,256]", 2048, 1, 32),
    ]
    for start, step, times in ((3, 1, 29), (0, 2, 16), (1, 2, 16), (0, 0, None)):
        other = TPU.replace("START", str(start)).replace("STEP", str(step))
        assert {c.times for c in collectives(other)} == {times}
    for known, unknown in (("add(%i", "multiply(%i"), ("LT", "GT"), ("tuple(%copied", "f(%copied")):
        other = one_by_one.replace(known, unknown)
        assert {c.times for c in collectives(other)} == {None}


def test_a_gpu_program():
    found = {(c.kind, c.array): (c.bytes, c.count) for c in collectives(GPU)}
    assert found == {
        ("all-gather", "f32[16,4]"): (256, 1),
        ("all-gather", "f32[128]"): (512, 1),
        ("all-reduce", "f32[8,4]"): (128, 1),
        ("all-reduce", "f32[64]"): (256, 1),
        ("collective-permute", "f32[8,4]"): (128, 1),
        ("reduce-scatter", "f32[64]"): (256, 1),
    }


def test_a_refusal_is_a_forecast():
    gib = 2**30
    used = "Ran out of memory in memory space hbm. Used 16.40G of 15.75G hbm. Exceeded"
    assert _out_of_memory(used) == (int(16.4 * gib), int(15.75 * gib))
    total = "required for HLO temporaries (512.5M) exceeds available HBM (15.75G)."
    assert _out_of_memory(total) == (int(512.5 * 2**20), int(15.75 * gib))
    assert _out_of_memory("Ran out of memory in memory space vmem") == (None, None)
    refused = lora.parallel.Forecast("TPU", 4, *[None] * 4, 3 * gib, 2 * gib, None, None, (), 1.0)
    assert refused.fits is False and refused.collective_bytes is None
    assert "4 x TPU: it does not fit" in str(refused)
    assert re.search(r"peak +3.00 GiB\ncapacity +2.00 GiB\ncollectives +not known", str(refused))


def test_it_prints(mesh):
    x = on(mesh, (8, 1024), P("data"))
    text = str(
        lora.parallel.forecast(lambda x: x.sum(0), x, out_shardings=NamedSharding(mesh, P()))
    )
    assert re.match(r"8 x cpu: its memory is not known; compiled in [\d.]+ s\n", text)
    assert re.search(r"arguments +4.00 KiB", text)
    assert re.search(r"all-reduce +f32\[1024\] +4.00 KiB +1 +1", text)


@pytest.mark.parametrize(
    "name,kwargs,message",
    [
        ("v5e", {"fsdp": 4}, r"'v5e' is not the name of a topology: expected e.g. 'v4:2x2x2'"),
        ("a100:1x1x8", {"fsdp": 8}, r"'a100:1x1x8' is not the name of a topology"),
        (
            "v5e:2x2",
            {},
            r"expected positive integers.*lora.parallel.topology_mesh\('v5e:2x2', fsdp=4\)",
        ),
        ("v5e:2x2", {"fsdp": 0}, r"expected positive integers, found num_slices=1, \{'fsdp': 0\}"),
        *(("v5e:2x2", {"fsdp": n}, "expected positive integers") for n in ("4", 4.0, True, None)),
        ("v5e:2x2", {"fsdp": 4, "num_slices": "2"}, "expected positive integers"),
        *((name, {"fsdp": 1}, "is not the name of a topology") for name in (None, "h100:1x1x0")),
        ("h100:8x8", {"fsdp": 64}, r"partitions, hosts of each and GPUs of each"),
    ],
)
def test_names_that_no_topology_has(name, kwargs, message):
    with pytest.raises(lora.LoRAError, match=message):
        lora.parallel.topology_mesh(name, **kwargs)


@pytest.mark.parametrize(
    "name,module,message",
    [
        ("v5e:2x2", "libtpu", r"pip install 'jax\[tpu\]'"),
        ("h100:1x1x8", "jax_plugins", r"pip install jax-cuda12-plugin==\d+\.\d+"),
    ],
)
def test_a_compiler_that_is_missing_is_named(name, module, message):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    with pytest.raises(lora.LoRAError, match=message):
        lora.parallel.topology_mesh(name, fsdp=8)


def of_topology(name, **axes):
    """A mesh of devices that are not there, where their compiler is installed."""
    if name.startswith("h100"):
        pytest.importorskip("jax_plugins.xla_cuda12", reason="needs jax-cuda12-plugin")
    else:
        pytest.importorskip("libtpu", reason="needs jax[tpu]")
        os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        os.environ["TPU_LOG_DIR"] = "disabled"
    return lora.parallel.topology_mesh(name, **axes)


@pytest.mark.slow
def test_meshes_of_topologies():
    assert dict(of_topology("v5e:16x16", fsdp=16, tp=16).shape) == {"fsdp": 16, "tp": 16}
    assert of_topology("v5e:1x1", one=1).size == 1
    assert of_topology("v4:2x2x1", fsdp=4).devices[0].device_kind == "TPU v4"
    assert of_topology("v5p:4x4x4", fsdp=8, tp=8).axis_types == (AxisType.Auto,) * 2
    pods = of_topology("v5e:4x4", num_slices=2, data=4, tp=8)
    assert [[d.slice_index for d in row] for row in pods.devices] == [[0] * 8] * 2 + [[1] * 8] * 2
    with pytest.raises(lora.LoRAError, match=r"has 4 devices, the axes \{'fsdp': 8\} have 8"):
        of_topology("v5e:2x2", fsdp=8)
    with pytest.raises(lora.LoRAError, match="the first axis runs over the 2 slices"):
        of_topology("v5e:2x2", num_slices=2, tp=1, fsdp=8)
    with pytest.raises(lora.LoRAError, match=r"(?s)Invalid TPU external name.*expected e\.g\."):
        of_topology("v9:2x2", fsdp=4)


@pytest.mark.slow
def test_too_large_a_program_does_not_fit():
    mesh = of_topology("v5e:2x2", fsdp=4)
    plan = lora.parallel.forecast(lambda x: x + 1, on(mesh, (12 * 2**30,), P(), "int8"))
    assert plan.fits is False and plan.peak >= 24 * 2**30
    assert plan.capacity == lora.parallel.forecast(jnp.sin, on(mesh, (8,), P())).capacity


WIDTH, LENGTH, RANK = 4096, 96, 4
SHAPE = dict(vocab=8192, width=WIDTH, hidden=8192, heads=32, layers=2)
MESHES = {
    "v5e:2x4": dict(fsdp=2, tp=4),
    "v6e:16x16": dict(fsdp=16, tp=16),
    "h100:1x1x8": dict(fsdp=2, tp=4),
}


@functools.cache
def adapted_step(name, arm):
    """(arguments, forecast) of a step of the scanned model, two sequences on each row of chips."""
    mesh = of_topology(name, **MESHES[name])
    with jax.numpy_dtype_promotion("standard"):  # Flax, optax
        f, args, options = pod.step(arm, mesh, (2 * mesh.shape["fsdp"], LENGTH), SHAPE, rank=RANK)
        return args, lora.parallel.forecast(f, *args, **options)


def weight_sized_gradients(name, arm):
    """The reductions of arrays as large as a chip's part of an adapted matrix, or larger.

    An activation has a sequence axis, so its size is a multiple of three; no weight's is.
    """
    plan = adapted_step(name, arm)[1]
    shard = WIDTH * WIDTH // plan.devices
    count = lambda c: math.prod(int(d) for d in re.findall(r"\d+", c.array.split("[")[1]))
    reduced = [c for c in plan.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    return [c for c in reduced if count(c) >= shard and count(c) % 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
class TestOnDevicesThatAreNotThere:
    def test_peak(self, name):
        """The arguments; a layer's weights and the head, gathered; a few layers' activations."""
        args, plan = adapted_step(name, "lora")
        tokens, tp = 2 * LENGTH, MESHES[name]["tp"]
        weights = WIDTH * (SHAPE["vocab"] + 4 * WIDTH + 3 * SHAPE["hidden"])
        gathered = 2 * weights // tp
        hidden = 4 * tokens * (4 * WIDTH + 4 * SHAPE["hidden"] + 3 * SHAPE["vocab"])
        assert plan.arguments <= 1.1 * local_bytes(args)
        assert plan.peak <= 1.1 * local_bytes(args) + gathered + hidden
        assert plan.peak < adapted_step(name, "full")[1].peak / 2
        assert plan.fits

    def test_donation(self, name):
        """Adapters and optimiser's state are updated in place. (A TPU's scalar takes a tile.)"""
        (adapters, state, *_), plan = adapted_step(name, "lora")
        want = local_bytes((adapters, state))
        assert plan.aliased in (want, want - 4 + 512)

    def test_no_gradient_is_as_large_as_a_weight(self, name):
        assert not weight_sized_gradients(name, "lora")

    def test_of_full_fine_tuning_one_is(self, name):
        """So the test above can fail."""
        assert weight_sized_gradients(name, "full")

    def test_every_loop_is_counted(self, name):
        plan = adapted_step(name, "lora")[1]
        assert {c.times for c in plan.collectives} == {1, SHAPE["layers"]}

    def test_on_a_quantised_base(self, name):
        """Its arguments are its bits; beyond the bf16 base's step it needs a layer's weights."""
        args, plan = adapted_step(name, "nf4")
        bf16 = adapted_step(name, "lora")[1]
        tp = MESHES[name]["tp"]
        layer = 2 * WIDTH * (4 * WIDTH + 3 * SHAPE["hidden"]) // tp
        assert plan.arguments <= 1.1 * local_bytes(args)
        assert plan.arguments < 0.6 * bf16.arguments
        assert plan.temporaries <= bf16.temporaries + layer
