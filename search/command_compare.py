"""`vptsp compare`: two models on the same images."""

from __future__ import annotations

from .inputs import check_compared, is_main_rank, orders_of, stores_of
from .report import compare_stores, write_report


def run(options):
    """Compare, write the report and print its table."""
    check_compared(options)
    orders = orders_of(options)
    (first, first_gallery), (second, second_gallery) = (
        stores_of(name, options) for name in (options.first, options.second)
    )
    if is_main_rank():
        report = compare_stores(
            first,
            second,
            first_gallery,
            second_gallery,
            recall_at=options.recall_at,
            resample=options.resample,
            confidence=options.confidence,
            seed=options.seed,
            progress=True,
            **orders,
        )
        print(write_report(options.output, report), end="")
