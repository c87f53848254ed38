"""Columns that are numbers but for a few rows are said, with the row."""

import json

import pandas as pd
import pytest
from data_fixtures import jpeg_bytes, write_files

from vptsp import load_splits


NAMES = [f"{'ab'[i % 2]}/{i}.jpg" for i in range(5)]


@pytest.fixture
def said(tmp_path, monkeypatch, caplog):
    """What loading a table of these columns says of mixed ones."""
    shop = write_files(tmp_path / "shop", {name: jpeg_bytes(i) for i, name in enumerate(NAMES)})
    monkeypatch.chdir(shop)

    def load(ending, **columns):
        columns = {"image": NAMES, "label": [name[0] for name in NAMES], **columns}
        if ending == ".csv":
            lines = [",".join(map(str, row)) for row in [list(columns), *zip(*columns.values(), strict=True)]]
        else:
            lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        place = shop / f"t{ending}"
        place.write_text("\n".join(lines))
        load_splits("table", pd.DataFrame(columns) if ending is None else place, cache_dir=tmp_path / "cache")
        found = [record.getMessage().replace(f"{shop}/", "") for record in caplog.records]
        caplog.clear()
        return [message for message in found if "no numbers to compare" in message]

    return load


def test_of_csv_where_most_are_numbers(said):
    assert said(".csv", price=["3", "4.5", "$5", "", "6"]) == [
        "t.csv:4: the column 'price' is text, no numbers to compare, as it holds '$5' here (so do 1 of 5 rows) and "
        "'3' at t.csv:2"
    ]
    assert (
        said(".csv", sku=["007", "1", "2", "", "10"], code=["1", "x", "y", "z", "2"], stock=[1, 2, "", 4, 5.5]) == []
    )


@pytest.mark.parametrize("ending", [".jsonl", None])
def test_of_values_with_types_always(said, ending):
    (message,) = said(
        ending, price=[3, None, "x", 4.5, "y"], stock=[1, None, 2, 3.5, 4], name=["1", "2", "3", "4", "5"]
    )
    assert "the column 'price' is text" in message and "holds 'x' here (so do 2 of 5 rows) and 3 at" in message
    assert message.startswith("t.jsonl:3: " if ending else "DataFrame, row 2: ")
