# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Records of measurements are complete, and the documentation shows what they say."""

import json

import pytest
import tables

RECORDS = sorted(path.stem for path in tables.RECORDS.glob("*.json"))
PAGE = "Before.\n\n<!-- record: {} -->\nold\n<!-- end of record -->\n\nAfter.\n"


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_has_what_a_reader_needs(name):
    record = tables.read(name)
    assert {"date", "commit", "command", "environment", "results"} <= set(record)
    assert record["environment"]["hardware"] and record["results"]
    for result in record["results"]:
        assert set(result.get("target", {})) <= set(result.get("ratios", {}))
        assert result.get("equal", 0) <= result.get("tokens", 0)


def test_the_documentation_has_the_tables_of_the_records():
    pages = [path.read_text() for path in tables.ROOT.glob("docs/**/*.md")]
    assert any("<!-- record: " in page for page in pages)
    for page in pages:
        assert tables.with_tables(page) == page


def test_a_table_is_made_from_its_record(tmp_path, monkeypatch):
    record = {
        "date": "2026-01-02",
        "commit": "abc",
        "command": "make parity",
        "environment": {"hardware": "a GPU", "torch": "2.11"},
        "results": [
            {
                "case": "prefill",
                "dtype": "float32",
                "backend": "Triton",
                "engine": "eager",
                "equal": 1,
                "tokens": 2000,
            }
        ],
    }
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    (tmp_path / "new.json").write_text(json.dumps(record))
    page = tables.with_tables(PAGE.format("new"))
    assert page.startswith("Before.\n") and page.endswith("\nAfter.\n")
    assert "old" not in page
    assert "a GPU, torch 2.11, 2026-01-02, commit abc: `make parity`" in page
    assert "| prefill | float32 | Triton | eager | 1 of 2,000 |" in page
    assert tables.with_tables(page) == page
