# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which cores the benchmarks' engines get."""

import pytest
import served


@pytest.mark.parametrize(
    ("count", "shares"),
    [
        (1, [{0, 4, 1, 5, 2, 6}]),
        (2, [{0, 4}, {1, 5}]),
        (3, [{0, 4}, {1, 5}, {2, 6}]),
        (4, [{0, 4, 1, 5, 2, 6}] * 4),
    ],
)
def test_engines_share_the_cores_out(count, shares):
    assert served.shared_out([{0, 4}, {1, 5}, {2, 6}], count) == shares
