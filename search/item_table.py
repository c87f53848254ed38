"""The table of an index's items: a row for each, with its key, id, columns, and where it comes from."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from .columns import CONTENT_COLUMN, SOURCE_COLUMN, arrow_column, common_kind, kind_of, kind_of_arrow


def with_rows(table, keys, ids, columns):
    """A table with further rows; a column of whole numbers takes others too, and one of None takes anything."""
    arrays = {}
    for name in table.column_names[2:]:
        there = table.column(name)
        kind = None if there.null_count == len(there) else kind_of_arrow(there.type)
        kind = common_kind(name, kind, kind_of(columns[name])) or kind_of_arrow(there.type)
        arrays[name] = arrow_column(columns[name], kind)
        if there.type != arrays[name].type:
            position = table.column_names.index(name)
            table = table.set_column(position, name, there.cast(arrays[name].type))
    return pa.concat_tables([table, as_table(keys, ids, arrays)])


def passes(column, condition):
    """Which values of a column meet a condition."""
    if condition.operator in ("=", "!="):
        one_of = pc.is_in(column, _as_arrow(condition.values, column.type))
        return one_of if condition.operator == "=" else pc.invert(one_of)
    compare = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}[condition.operator]
    (value,) = condition.values
    return pc.fill_null(compare(column, pa.scalar(value)), False)


def _as_arrow(values, arrow_type):
    """Values to look for in a column: a fraction is none of its whole numbers."""
    if arrow_type == pa.int64():
        values = [int(value) for value in values if value == int(value)]
    return pa.array(values, arrow_type)


def as_table(keys, ids, columns):
    """Rows of the table; the columns of metadata in the order given."""
    return pa.table({"key": pa.array(keys, pa.int64()), "id": pa.array(ids, pa.string()), **columns})


def with_hidden(table):
    """The table, with the hidden columns that older versions didn't write."""
    for name, kind in ((CONTENT_COLUMN, "text"), (SOURCE_COLUMN, "integer")):
        if name not in table.column_names:
            table = table.append_column(name, arrow_column([None] * len(table), kind))
    return table


__all__ = ["as_table", "passes", "with_hidden", "with_rows"]
