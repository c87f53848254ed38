"""What is tuned, what is shipped, and what only training needs, counted: for whoever tells it."""

from __future__ import annotations


def tuned_counts(model) -> dict[str, float]:
    """Counts of parameters, and the megabytes that a saved retriever takes.

    Args:
        model: `VPTSPModel` or `VPTSPForMetricLearning`.

    Returns:
        Dict of `tuned_parameters` of `retriever_parameters`, `tuned_share` (0..1), `shipped_parameters` and
        `shipped_megabytes` (the backbone among them where it is saved along), and `training_only_parameters` (proxies,
        and what updates them).
    """
    retriever = model.retriever
    state, tuned = retriever.state_dict(), retriever.tuned_names()
    whole = model.config.save_backbone or model.config.backbone is None
    shipped = [tensor for name, tensor in state.items() if whole or name in tuned]
    num_tuned = sum(state[name].numel() for name in tuned)
    num_all = sum(tensor.numel() for tensor in state.values())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if getattr(model, "offloaded_class_prompts", None) is not None:
        num_trained += model.config.class_prompt_bytes // 4
    return {
        "tuned_parameters": num_tuned,
        "retriever_parameters": num_all,
        "tuned_share": num_tuned / num_all,
        "shipped_parameters": sum(tensor.numel() for tensor in shipped),
        "shipped_megabytes": sum(tensor.numel() * tensor.element_size() for tensor in shipped) / 1e6,
        "training_only_parameters": num_trained - num_tuned,
    }


__all__ = ["tuned_counts"]
