# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a benchmark leaves behind."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path

import torch
from environment import environment

from vllm.model_executor.checkpoint.files import whole_file


def write_record(path: Path, device: torch.device, **fields: object) -> None:
    """Write JSON of today's date, the command, the machine and what was measured.

    Args:
        path: of the file, which is replaced as a whole.
        device: that was measured.
        fields: of the record. `results` holds a dict for each measurement, with the
            keys of `measure.Result.as_dict`.
    """
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(device),
        **fields,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
