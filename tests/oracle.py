"""The method computed the slow and obvious way, from METHOD's words: prompts are concatenated, every layer is run
whole by transformers' own code, outputs at prompt positions are dropped; classes, images and proxies are looped over.

It takes a model only for its parameters, so that gradients of both computations can be compared name by name.
"""

import contextlib
import hashlib

import numpy as np
import torch
import torch.nn.functional as F


def prompts_of_layer(config, tokens, layer, class_prompts=False):
    """The prompts of one layer, cut out of `(total, D)`; None where it has none."""
    number, depth, step = (
        (config.num_class_prompts, config.class_prompt_depth, config.class_prompt_step)
        if class_prompts
        else (config.num_prompts, config.prompt_depth, config.prompt_step)
    )
    if tokens is None or layer >= depth:
        return None
    start = sum(max(number - earlier * step, 0) for earlier in range(layer))
    return tokens[start : start + max(number - layer * step, 0)]


def embed_one(model, image, prompt_tokens, head, class_prompts=False):
    """One image `(3, H, W)` through the naive prompted backbone and a head: `(E,)`."""
    config, backbone = model.config, model.vptsp.backbone
    with plain_prompts(model, prompt_tokens, class_prompts), plain_adapters(model):
        output = backbone(**stock_inputs(backbone, image[None]))
    pooled = stock_pooled(backbone, output, config.pooling)[0]
    if config.backbone_config.model_type == "deit" and config.pooling == "cls":
        vector = project(pooled[0], head.norm, head.projection)
        vector = (vector + project(pooled[1], head.distillation_norm, head.distillation_projection)) / 2
    else:
        vector = project(pooled, head.norm, head.projection)
    return vector / vector.norm()


# ---- Any backbone, by its own forward


def stock_inputs(backbone, pixel_values):
    """What a model of transformers takes for images `(B, 3, H, W)`, as its image processor gives it."""
    if backbone.config.model_type != "siglip2_vision_model":
        return {"pixel_values": pixel_values}
    side = backbone.config.patch_size
    shape = [pixel_values.shape[2] // side, pixel_values.shape[3] // side]
    patches = [
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side].permute(1, 2, 0).flatten()
        for image in pixel_values
        for row in range(shape[0])
        for column in range(shape[1])
    ]
    return {
        "pixel_values": torch.stack(patches).unflatten(0, (len(pixel_values), -1)),
        "pixel_attention_mask": torch.ones(len(pixel_values), shape[0] * shape[1], dtype=torch.int32),
        "spatial_shapes": torch.tensor([shape] * len(pixel_values)),
    }


def stock_pooled(backbone, output, pooling):
    """`(B, D)` from the output of a model of transformers; of a distilled DeiT, `cls` is `(B, 2, D)`."""
    kind, hidden = backbone.config.model_type, output.last_hidden_state
    registers = getattr(backbone.config, "num_register_tokens", 0)
    own = {"deit": 2, "siglip_vision_model": 0, "siglip2_vision_model": 0, "ijepa": 0}
    if pooling == "head" or (pooling == "cls" and output.get("pooler_output") is not None):
        return output.pooler_output
    if kind in ("clip_vision_model", "mlcd_vision_model"):
        hidden = backbone.post_layernorm(hidden)
    mean = hidden[:, own.get(kind, 1 + registers) :].mean(1)
    cls = hidden[:, :2] if kind == "deit" and pooling == "cls" else hidden[:, 0]
    return {"cls": cls, "mean": mean, "cls+mean": torch.cat([hidden[:, 0], mean], -1)}[pooling]


def layers_of(backbone):
    inner = next(getattr(backbone, name) for name in ("encoder", "model", "layers") if hasattr(backbone, name))
    return inner if isinstance(inner, torch.nn.ModuleList) else getattr(inner, "layers", None) or inner.layer


@contextlib.contextmanager
def plain_prompts(model, prompt_tokens, class_prompts=False):
    """Every layer called by the model's own forward gets its prompts in front and loses their outputs behind."""
    config, layers = model.config, layers_of(model.retriever.backbone)
    tables = [prompts_of_layer(config, prompt_tokens, index, class_prompts) for index in range(len(layers))]
    shallow = config.prompt_mode == "shallow"
    handles, number = [], 0
    for index, (layer, prompts) in enumerate(zip(layers, tables, strict=True)):
        added = number if prompts is None else len(prompts)
        number = added if shallow else 0
        if not added:
            continue
        last = not shallow or index == len(layers) - 1
        before, behind = _in_front(prompts, added), (lambda m, i, output, n=added: output[:, n:])
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles += [layer.register_forward_hook(behind)] if last else []
    yield
    for handle in handles:
        handle.remove()


def _in_front(prompts, number):
    """A hook that puts prompts in front of a layer's tokens; None: they are there already."""

    def others(value, num_tokens):
        if isinstance(value, torch.Tensor):  # a mask, of which there is no need
            assert value.all() if value.dtype == torch.bool else not value.any()
            return None
        if isinstance(value, (tuple, list)) and len(value[0]) == num_tokens:  # angles of all tokens: prompts have none
            cos, sin = value
            zeros = torch.zeros_like(cos[:1]).expand(number, -1)
            return torch.cat([zeros + 1, cos]), torch.cat([zeros, sin])
        return value

    def hook(layer, args, kwargs):
        hidden, *rest = args
        num_tokens = hidden.shape[1] - (number if prompts is None else 0)
        if prompts is not None:
            hidden = torch.cat([prompts.expand(len(hidden), -1, -1), hidden], dim=1)
        rest = [others(value, num_tokens) for value in rest]
        return (hidden, *rest), {name: others(value, num_tokens) for name, value in kwargs.items()}

    return hook


@contextlib.contextmanager
def plain_adapters(model):
    """The last layers add what their adapters make of the tokens in front of the MLP, or of its output."""
    config, layers = model.config, layers_of(model.retriever.backbone)
    handles = []
    for layer, adapter in zip(layers[len(layers) - config.adapter_layers :], model.retriever.adapters, strict=True):
        norm = next(getattr(layer, n) for n in ("layernorm_after", "norm2", "layer_norm2") if hasattr(layer, n))
        branch_end = getattr(layer, "layer_scale2", layer.mlp)
        seen = []
        handles.append(norm.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0])))
        handles.append(
            branch_end.register_forward_hook(
                lambda m, i, output, seen=seen, adapter=adapter: adapted(config, adapter, seen.pop(), output)
            )
        )
    yield
    for handle in handles:
        handle.remove()


def adapted(config, adapter, x, output):
    y = output if config.adapter_mode == "sequential" else x
    if config.adapter_norm == "pre":
        y = F.layer_norm(y, y.shape[-1:], adapter.norm_before.weight, adapter.norm_before.bias)
    y = y @ adapter.down.weight.T + adapter.down.bias
    y = y.clamp(min=0) @ adapter.up.weight.T + adapter.up.bias
    y = config.adapter_scale * y
    if config.adapter_norm == "post":
        y = F.layer_norm(y, y.shape[-1:], adapter.norm_after.weight, adapter.norm_after.bias)
    return output + y


def project(pooled, norm, projection):
    normed = F.layer_norm(pooled, pooled.shape, norm.weight, norm.bias, norm.eps)
    return projection.weight @ normed + projection.bias


def gru(model, p, s):
    e = model.config.embedding_dim
    gates = model.proxies.gru
    w_z, w_r, w_h = (gates.input_weight[i * e : (i + 1) * e] for i in range(3))
    u_z, u_r, u_h = (gates.state_weight[i * e : (i + 1) * e] for i in range(3))
    b_z, b_r, b_h = (gates.bias[i * e : (i + 1) * e] for i in range(3))
    z = torch.sigmoid(w_z @ p + u_z @ s + b_z)
    r = torch.sigmoid(w_r @ p + u_r @ s + b_r)
    n = w_h @ p + r * (u_h @ s) + b_h
    n = torch.relu(n) if model.config.proxy_update == "gru_relu" else torch.tanh(n)
    return (1 - z) * s + z * n


def forward(model, pixel_values, labels):
    """Embeddings (B, E), loss and the whole new S (C, E), or None without semantic proxies."""
    config = model.config
    embeddings = torch.stack(
        [embed_one(model, image, model.vptsp.prompts.tokens, model.vptsp.head) for image in pixel_values]
    )
    original = model.proxies.original_proxies
    state = None
    if config.proxy_update != "none":
        head = model.vptsp.head if config.proxy_head == "shared" else model.proxy_head
        class_tokens = model.class_prompts.tokens
        state = list(model.proxies.state.detach().clone())
        for c in sorted(set(labels.tolist())):
            vectors = [
                embed_one(model, image, None if class_tokens is None else class_tokens[c], head, class_prompts=True)
                for image, label in zip(pixel_values, labels.tolist(), strict=True)
                if label == c
            ]
            if config.proxy_update == "mean":
                state[c] = config.proxy_keep * state[c] + (1 - config.proxy_keep) * sum(vectors) / len(vectors)
                state[c] = state[c] / state[c].norm()
                continue
            for vector in vectors:
                state[c] = gru(model, vector, state[c])
                if config.proxy_normalization == "per_step":
                    state[c] = state[c] / state[c].norm()
            if config.proxy_normalization == "per_batch":
                state[c] = state[c] / state[c].norm()
        state = torch.stack(state)
    a = config.proxy_bias_ratio
    proxies = []
    for c in range(config.num_classes):
        q = original[c] if state is None else (1 - a) * state[c] + a * original[c]
        proxies.append(q / q.norm())
    compared = range(config.num_classes) if config.proxy_range == "all" else sorted(set(labels.tolist()))
    return embeddings, loss(config, embeddings, proxies, labels.tolist(), list(compared)), state


def loss(config, embeddings, proxies, labels, compared):
    alpha, delta = config.loss_alpha, config.loss_delta
    similarity = {(b, c): embeddings[b] @ proxies[c] for b in range(len(labels)) for c in compared}
    zero = embeddings.new_zeros(())
    if config.loss == "proxy_nca":
        total = zero
        for b, own in enumerate(labels):
            total = total + torch.log(1 + torch.exp(-alpha * (similarity[b, own] - delta)))
            total = total + torch.log(
                1 + sum((torch.exp(alpha * (similarity[b, c] + delta)) for c in compared if c != own), zero)
            )
        return total / len(labels)
    positive, negative = zero, zero
    for c in compared:
        positive = positive + torch.log(
            1 + sum((torch.exp(-alpha * (similarity[b, c] - delta)) for b, own in enumerate(labels) if own == c), zero)
        )
        negative = negative + torch.log(
            1 + sum((torch.exp(alpha * (similarity[b, c] + delta)) for b, own in enumerate(labels) if own != c), zero)
        )
    positives = len(compared) if config.proxy_anchor_reduction == "all_classes" else len(set(labels))
    return positive / positives + negative / len(compared)


def first_fingerprint(state_dict):
    """Fingerprint of the first kind, as retrievers of earlier versions hold it: names in order, shapes, 64 samples of
    each tensor in float32."""
    parts = []
    for name, tensor in sorted(state_dict.items()):
        values = tensor.float().numpy().ravel()
        samples = values[:: max(len(values) // 64, 1)][:64]
        parts += [f"{name} {tuple(tensor.shape)} ".encode(), np.ascontiguousarray(samples).tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()
