"""The method computed the slow and obvious way, from METHOD's words: prompts are concatenated, every layer is run
whole by transformers' own code, outputs at prompt positions are dropped; classes, images and proxies are looped over.

It takes a model only for its parameters, so that gradients of both computations can be compared name by name.
"""

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
    x = backbone.embeddings(image[None])
    for index in range(len(layers_of(backbone))):
        prompts = prompts_of_layer(config, prompt_tokens, index, class_prompts)
        x = x if prompts is None else torch.cat([prompts[None], x], dim=1)
        x = run_layer(model, index, x)
        x = x if prompts is None or config.prompt_mode == "shallow" else x[:, len(prompts) :]
    if config.prompt_mode == "shallow" and prompt_tokens is not None:
        x = x[:, len(prompt_tokens) :]
    x = backbone.layernorm(x)[0]
    mean = x[2 if config.backbone_config.model_type == "deit" else 1 :].mean(0)
    pooled = {"cls": x[0], "mean": mean, "cls+mean": torch.cat([x[0], mean])}[config.pooling]
    vector = project(pooled, head.norm, head.projection)
    if config.backbone_config.model_type == "deit" and config.pooling == "cls":
        vector = (vector + project(x[1], head.distillation_norm, head.distillation_projection)) / 2
    return vector / vector.norm()


def layers_of(backbone):
    return backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer


def project(pooled, norm, projection):
    normed = F.layer_norm(pooled, pooled.shape, norm.weight, norm.bias, norm.eps)
    return projection.weight @ normed + projection.bias


def run_layer(model, index, x):
    """One whole layer, with its adapter if it is among the last `adapter_layers`."""
    config, layers = model.config, layers_of(model.vptsp.backbone)
    layer, position = layers[index], index - (len(layers) - config.adapter_layers)
    if position < 0:
        return layer(x)
    x = x + layer.attention(layer.layernorm_before(x))[0]
    output = layer.mlp(layer.layernorm_after(x))
    adapter = model.vptsp.adapters[position]
    y = output if config.adapter_mode == "sequential" else x
    if config.adapter_norm == "pre":
        y = F.layer_norm(y, y.shape[-1:], adapter.norm_before.weight, adapter.norm_before.bias)
    y = y @ adapter.down.weight.T + adapter.down.bias
    y = y.clamp(min=0) @ adapter.up.weight.T + adapter.up.bias
    y = config.adapter_scale * y
    if config.adapter_norm == "post":
        y = F.layer_norm(y, y.shape[-1:], adapter.norm_after.weight, adapter.norm_after.bias)
    return x + output + y


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
