"""Rules of operations that compute: elementwise, layers, norms, pooling, reductions, products."""

from __future__ import annotations

import math

from prune_dn.graph.flow import Flow, along, constant, full, take
from prune_dn.graph.rules import Call, Weight, aten, combine, mix, rule, sized, tie_stacked
from prune_dn.graph.types import Op


@aten(
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish"),
    *("sigmoid", "tanh", "hardsigmoid", "hardswish", "softplus", "softsign", "log_sigmoid", "erf"),
    *("exp", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "pow", "square", "sign"),
    *("clamp", "clamp_min", "clamp_max", "threshold", "logit", "nan_to_num", "round", "floor"),
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "true_divide",
        "maximum",
        "minimum",
        "addcmul",
        "addcdiv",
    ),
    *("lerp", "where", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "logical_not", "isnan"),
    *(
        "logical_and",
        "logical_or",
        "bitwise_and",
        "bitwise_or",
        "bitwise_not",
        "fmax",
        "fmin",
        "sin",
        "cos",
        "hardshrink",
        "softshrink",
    ),
    *(
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to",
        "_to_copy",
        "type_as",
        "positive",
        "lift_fresh_copy",
    ),
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
)
def elementwise(call: Call) -> Flow:
    """Each element depends on the elements at its own position."""
    return combine(call, call.flows(), call.shape)


@aten("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_like")
@rule("aten.zeros", "aten.ones", "aten.full", "aten.arange", "aten.empty", "aten.scalar_tensor")
@rule("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty", "aten.linspace")
def made_up(call: Call) -> Flow:
    """A tensor whose values depend on no channel."""
    return constant(call.shape)


@aten("bernoulli")
def noise(call: Call) -> Flow:
    """Random numbers."""
    return call.flow(0)


@aten(
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
def convolution(call: Call) -> Flow:
    """A convolution reads its inputs and makes its outputs; a depthwise one follows."""
    general = call.name == "aten.convolution"
    transposed = bool(call.args[6]) if general else "transpose" in call.name
    groups = int(call.args[8 if general else 6])
    return _layer(call, 1, groups, transposed)


@aten("linear")
def linear(call: Call) -> Flow:
    """A linear layer reads the last axis and makes it."""
    return _layer(call, -1, 1, False)


def _layer(call: Call, axis: int, groups: int, transposed: bool) -> Flow:
    x, weight, shape = call.flow(0), call.args[1], call.shape
    if 1 < groups == x.shape[axis] == shape[axis] and (flow := _fixed_kernel(call)) is not None:
        return flow
    computed = not isinstance(weight, Weight)
    weight = call.computed_from if computed else weight
    if weight is None or not weight.is_parameter or weight.name.rpartition(".")[2] != "weight":
        mix(
            call, f"{call.name.removeprefix('aten.')} reads it with a weight that is no layer's own"
        )
        return constant(shape)
    layer, outputs = weight.layer, shape[axis]
    if computed:  # nothing of it may go, but it has its cost
        reason = (
            f"{layer} computes its weight anew in each forward; replace it by a plain layer first"
        )
        call.build.fix(call.build.produce(layer, outputs), reason)
        mix(call, reason)
    call.build.used.add(weight.name)
    bias = call.args[2]
    if isinstance(bias, Weight) and bias.layer == layer:
        call.build.used.add(bias.name)
    elif bias is not None:
        call.build.fix(call.build.produce(layer, outputs), f"the bias of {layer} is computed")
    ids = call.build.channels(x, axis, f"{layer} reads it along another axis")
    positions = (
        math.prod((x.shape if transposed else shape)[2:]) if axis == 1 else math.prod(shape[1:-1])
    )
    kernel = weight.shape[2:]
    call.build.op(Op(layer, kernel, groups, positions, bias is not None))
    if 1 < groups == x.shape[axis]:
        made = ids.repeat(outputs // groups)
        call.build.follow(layer, made)
        return along(shape, axis, made)
    made = call.build.produce(layer, outputs)
    call.build.read(layer, ids, call.select)
    if groups > 1:
        call.build.balance(ids.reshape(groups, -1))
        call.build.balance(made.reshape(groups, -1))
    return along(shape, axis, made)


def _fixed_kernel(call: Call) -> Flow | None:
    """A depthwise convolution with a kernel that is a buffer (it follows), or one for all channels."""
    kernel, bias, origin = call.args[1], call.args[2], call.computed_from
    is_buffer = isinstance(kernel, Weight) and not kernel.is_parameter
    is_one = not isinstance(kernel, Weight) and (origin is None or origin.shape[0] == 1)
    if bias is not None or not (is_buffer or is_one):
        return None
    ids = call.build.channels(call.flow(0), 1, "a convolution reads it along another axis")
    if is_buffer:
        call.build.used.add(kernel.name)
        call.build.follow(kernel.name, ids)
    return along(call.shape, 1, ids)


@aten("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")
def channel_norm(call: Call) -> Flow | list[Flow]:
    """A norm with statistics of its own for each channel follows."""
    x = call.flow(0)
    ids = call.build.channels(x, 1, "a norm reads it along another axis")
    layers = set()
    for operand in call.args[1:5]:
        if isinstance(operand, Weight):
            call.build.used.add(operand.name)
            layers.add(operand.layer)
        elif isinstance(operand, Flow):
            call.build.fix(ids, "a norm's scale or shift is computed")
    for layer in sorted(layers):
        call.build.follow(layer, ids, math.prod(x.shape[2:]))
    flow = along(call.shape, 1, ids)
    return [flow, *map(constant, call.shapes[1:])] if len(call.shapes) > 1 else flow


@aten("prelu", "_prelu_kernel")
def prelu(call: Call) -> Flow:
    """A slope for each channel, or one for all."""
    x, weight = call.flow(0), call.args[1]
    if not isinstance(weight, Weight):
        return combine(call, call.flows(), call.shape)
    call.build.used.add(weight.name)
    if math.prod(weight.shape) > 1:
        ids = call.build.channels(x, 1, "PReLU reads it along another axis")
        call.build.follow(weight.layer, ids)
    return x


@aten("layer_norm", "native_layer_norm")
def layer_norm(call: Call) -> Flow | list[Flow]:
    """A norm whose statistics run over several channels: the others would change if one went."""
    x = call.flow(0)
    for operand in call.args:
        if isinstance(operand, Weight):
            call.build.used.add(operand.name)
    call.build.fix(x.ids, "a layer norm takes its statistics over several channels")
    flow = Flow(call.shapes[0], x.ids)
    return [flow, *map(constant, call.shapes[1:])] if len(call.shapes) > 1 else flow


@aten("group_norm")
def group_norm(call: Call) -> Flow:
    """A norm whose statistics run over the channels of a group, which go together or stay."""
    x, groups = call.flow(0), int(call.args[1])
    ids = call.build.channels(x, 1, "a norm reads it along another axis")
    owners = {w.layer for w in call.args[2:4] if isinstance(w, Weight)}
    call.build.used |= {w.name for w in call.args[2:4] if isinstance(w, Weight)}
    if groups == 1 or not owners:  # a norm without weights is no layer that could be cut
        call.build.fix(ids, "a group norm takes its statistics over several channels")
    else:
        rows = ids.reshape(groups, -1)
        call.build.tie(rows[:, :1], rows, "a group norm makes it one with what is no channel")
    for layer in sorted(owners):
        call.build.follow(layer, ids)
    return along(call.shape, 1, ids)


@aten(
    *(f"{kind}_pool{d}d" for kind in ("max", "avg", "lp") for d in (1, 2, 3)),
    *(f"adaptive_{kind}_pool{d}d" for kind in ("max", "avg") for d in (1, 2, 3)),
    *(f"max_pool{d}d_with_indices" for d in (2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d")),
    *(f"upsample_{kind}" for kind in ("bicubic2d", "trilinear3d", "linear1d", "nearest_exact2d")),
    *("_upsample_bilinear2d_aa", "grid_sampler_2d", "grid_sampler_3d", "fractional_max_pool2d"),
)
def spatial(call: Call) -> Flow | list[Flow]:
    """Mixes positions within each channel."""
    x = call.flow(0)
    for other in call.flows()[1:]:
        call.build.fix(other.ids, "it says where another tensor is read")
    axis = len(x.shape) - 1 - int("".join(c for c in call.name if c.isdigit())[:1] or 2)
    if any(size > 1 for d, size in enumerate(x.ids.shape) if d != axis):
        call.build.fix(x.ids, "pooling over an axis of channels reads it")
        return [constant(shape) for shape in call.shapes]
    flow = along(call.shape, axis, full(x, axis).ravel())
    return [flow] * len(call.shapes) if len(call.shapes) > 1 else flow


@aten(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "any",
    "prod",
)
def reduction(call: Call) -> Flow:
    """Some axes are summed up; where ids differ along no others, all must stay."""
    x = call.flow(0)
    listed = [a for a in call.args[1:] if isinstance(a, list | tuple)]
    axes = [int(d) % len(x.shape) for d in (listed[0] if listed else ())]
    if not axes:
        single = [a for a in call.args[1:2] if isinstance(a, int) and not isinstance(a, bool)]
        axes = [single[0] % len(x.shape)] if single else list(range(len(x.shape)))
    what = call.name.split(".")[1]
    if not tie_stacked(call, x, axes, f"{what} over an axis of channels reads it"):
        return constant(call.shape)
    ids = x.ids[tuple(slice(0, 1) if d in axes else slice(None) for d in range(x.ids.ndim))]
    if len(call.shape) < len(x.shape):
        ids = ids.reshape([size for d, size in enumerate(ids.shape) if d not in axes])
    return Flow(call.shape, ids)


@aten("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "glu")
def over_one_axis(call: Call) -> Flow:
    """Each element depends on all along one axis."""
    x, axis = call.flow(0), int(call.args[1])
    what = call.name.split(".")[1].strip("_")
    if what == "glu":
        half = x.shape[axis % len(x.shape)] // 2
        sizes = sized(x.shape, axis, half)
        parts = [take(x, axis, slice(i * half, (i + 1) * half), sizes) for i in range(2)]
        return combine(call, parts, call.shape)
    tie_stacked(call, x, [axis % len(x.shape)], f"{what} over its axis reads it")
    return Flow(call.shape, x.ids)


@aten(
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "scaled_dot_product_attention",
    "dot",
    "outer",
)
def product(call: Call) -> list[Flow]:
    """A product of tensors sums over channels."""
    mix(call, f"{call.name.split('.')[1]}, a product of tensors, reads it")
    return [constant(shape) for shape in call.shapes]
