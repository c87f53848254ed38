"""Reading JSON so that nothing in it is passed over."""


def without_duplicates(pairs):
    """A JSON object, as `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: a key is there twice, of which the last would win.
    """
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


__all__ = ["without_duplicates"]
